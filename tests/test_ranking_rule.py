"""Who ranks by one seed is told so, and who does not rank is left alone."""

from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from tests import notebook_rules as rules

SAID = "Bars. Bars are means of 3 seeds; whiskers reach from the least to the greatest value."


def problems(source: str, *shown: str) -> list[str]:
    outputs = [new_output("display_data", data={"text/plain": text}) for text in shown]
    nb = new_notebook(cells=[new_code_cell(source, id="here", outputs=outputs)])
    return rules.rankings_rest_on_seeds(nb, Path("01_a.ipynb"))


@pytest.mark.parametrize(
    ("claim", "word"),
    [
        ("LoRA scores higher than full finetuning", "higher"),
        ("Half of the answers false costs more than ten points", "costs"),
        ("LoRA forgets far more than full finetuning", "more than"),
        ("PPO refuses less of what it knows than SFT does", "less of what it knows than"),
        ("Of the four runs the one without an end has the lowest training loss", "lowest"),
        ("Rank 8 reaches the best of all scores", "best"),
        (
            "Fewer answers end with LoRA than with full finetuning",
            "Fewer answers end with LoRA than",
        ),
    ],
)
def test_a_claim_that_ranks_by_one_seed_is_noticed(claim, word):
    for evidence in ("", ", seeds=1", ", seeds=2", ', kind="control"', ', kind="stored"'):
        [problem] = problems(f'lesson.claim("{claim}", a > b, f"{{a}}"{evidence})')
        assert f"{word}'. Run three" in problem and problem.startswith("cell 0, here")
    for evidence in ("seeds=3", "seeds=full.count", 'kind="arithmetic"', 'kind="source"'):
        assert problems(f'lesson.claim("{claim}", a > b, f"{{a}}", {evidence})') == []
    assert problems(f'lesson.claim("In one run: {claim}", a > b)') == []


@pytest.mark.parametrize(
    "claim",
    [
        "More than half of the loss's fall happens in the first steps",
        "LoRA's file is smaller, and costs less memory than the model's",
        "TRL refuses all datasets, one with no more than the name of a column",
        "Training stops three evaluations after the lowest evaluation loss",
        "All answers end",
    ],
)
def test_a_claim_that_does_not_rank_is_left_alone(claim):
    assert problems(f'lesson.claim("{claim}", True)') == []


def test_a_text_in_parts_is_read_as_one():
    claim = 'lesson.claim(f"{name} scores " + "higher than " f"{other}", a > b)'
    assert len(problems(claim)) == 1 and len(problems(f"for x in y:\n    {claim}")) == 1


@pytest.mark.parametrize(
    "figure",
    [
        'viz.bars(t, title="What flaws cost", alt="Bars.", y_label="exact match (%)")',
        'viz.compare(t, "LoRA scores worse", "Bars.")',
        'viz.scatter(t, "All methods", "Plain DPO has the lower score.", "KL (nats)", "score")',
    ],
)
def test_a_figure_that_ranks_by_one_seed_is_noticed(figure):
    for shown in ("Bars.", SAID.replace("3", "2"), SAID.replace("3", "2 to 5")):
        [problem] = problems(figure, shown)
        assert "give viz the values of every seed" in problem
    assert problems(figure, SAID) == problems(figure, SAID.replace("3", "3 to 5")) == []
    assert problems(figure, "Mean and range of three runs.") == []
    assert problems(figure.replace("viz.", "other.")) == []


@pytest.mark.parametrize(
    "figure",
    [
        'viz.bars(t, title="What layers cost", alt="Bars.", y_label="GiB")',
        'viz.curves({f"DPO, seed {i}": x for i in r}, "The loss", "One loss is higher.")',
        'viz.curves(t, "Loss", "It falls.", y_label="loss; lower is better")',
    ],
)
def test_a_figure_of_something_else_or_of_its_seeds_is_left_alone(figure):
    assert problems(figure, "Bars.") == []


def test_a_cell_that_python_cannot_read_is_left_alone():
    assert problems("%matplotlib inline\nx = 1") == problems("!ls\nx ==") == []
