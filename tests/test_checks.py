"""What the exercises give to students, and hints that must not tell too much."""

import ast
import re
from pathlib import Path

from sftlib import checks
from sftlib.chat import CHATML, encode
from sftlib.checks import chatml
from sftlib.checks.deepspeed import BROKEN
from sftlib.checks.trl_preferences import CASES, METHODS
from sftlib.checks.two_ranks import BROKEN_SCRIPT
from sftlib.experiments.diagnosis import HEALTHY
from sftlib.experiments.failures import unnamed

import nbformat
import pytest

LESSONS = Path(__file__).parents[1] / "notebooks"


@pytest.mark.parametrize(
    "path", sorted((LESSONS / "solutions").glob("*.ipynb")), ids=lambda path: path.stem
)
def test_exercises_have_the_numbers_of_their_lesson(path):
    called = re.findall(r"checks\.(check_\w+)\(", path.read_text(encoding="utf-8"))
    for number, name in enumerate(dict.fromkeys(called), start=1):
        said = getattr(checks, name).__doc__
        assert said.startswith(f"Lesson {int(path.stem[:2])}, exercise {number}: ")


def test_a_hint_about_methods_does_not_name_the_answer():
    solution = {task: method for task, (method, _) in CASES.items()}
    for task, method in solution.items():
        other = next(name for name in METHODS if name != method)
        message = checks.check_methods(solution | {task: other}).message
        assert f"Look again at {task}" in message and method.lower() not in message.lower()


def test_signs_may_be_named_one_by_one():
    signs = {letter: training.sign or HEALTHY for letter, training in unnamed().items()}
    verdict = checks.check_diagnosis(signs | {"C": ..., "D": ...})
    assert verdict.passed is None
    assert "16 of 18 are right. Still open: C, D." in verdict.message


def test_each_batch_of_lesson_3_has_the_bug_of_its_letter(tokenizer):
    tokenizer.chat_template = CHATML
    found = checks.broken_batches(tokenizer)
    whole = encode([chatml.QUESTION, chatml.ANSWER], tokenizer)
    ids, mask = whole["input_ids"], whole["assistant_masks"]
    learned = [i for i, is_learned in zip(ids, mask, strict=True) if is_learned]
    seen = {
        letter: [label for label in batch["labels"] if label != -100]
        for letter, batch in found.items()
    }
    assert all(len(batch["input_ids"]) == len(batch["labels"]) for batch in found.values())
    assert seen["A"] == learned and found["A"]["labels"].index(learned[0]) == mask.index(1) - 1
    assert seen["B"] == learned[:-1] and seen["C"] == learned and seen["E"] == ids
    assert found["C"]["input_ids"][-len(learned) :] == found["C"]["labels"][-len(learned) :]
    assert tokenizer.decode(found["C"]["input_ids"]).count("<|im_start|>user") == 2
    assert seen["D"] == learned + [tokenizer.pad_token_id] * 3


def test_the_configurations_to_repair_are_those_of_lesson_5():
    cells = nbformat.read(LESSONS / "05_deepspeed.ipynb", 4).cells
    source = next(c.source for c in cells if "checks.check_configs(" in c.source)
    given = source.partition("repaired = ")[2].partition("\n\nchecks.")[0]
    assert ast.literal_eval(given) == BROKEN
    assert checks.check_configs(ast.literal_eval(given)).passed is None


def test_the_script_to_mend_is_that_of_lesson_5():
    cells = nbformat.read(LESSONS / "05_deepspeed.ipynb", 4).cells
    (source,) = [
        c.source for c in cells if c.source.startswith("%%writefile") and "broken" in c.source
    ]
    assert source.partition("\n")[2] == BROKEN_SCRIPT.strip()
