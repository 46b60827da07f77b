"""The stored runs of lesson 2 are those of the lesson's own cells, and are read as spreads."""

import json
import warnings

from sftlib.data import read_jsonl
from sftlib.experiments.data_quality import RUNS, stored_scores

import pytest

from tools.stored_runs import data_quality


@pytest.fixture(scope="module")
def lesson():
    return data_quality.lesson_names()


@pytest.mark.integration  # the lesson's set-up loads the model
def test_the_stored_runs_are_those_of_the_lesson(lesson):
    rows = read_jsonl(RUNS)
    keys = ("experiment", "data", "seed", "steps")
    found = {tuple(row[key] for key in keys): row for row in rows}
    wanted = {tuple(getattr(run, key) for key in keys) for run in data_quality.stored(lesson)}
    assert found.keys() == wanted and len(found) == len(rows)
    sets = {seed: data_quality.training_sets(lesson, seed) for seed in data_quality.SEEDS}
    for run in data_quality.stored(lesson):
        row = found[tuple(getattr(run, key) for key in keys)]
        train_rows = sets[run.seed][run.experiment][run.data]
        again = len(train_rows), data_quality.digest(train_rows)
        assert (row["rows"], row["set"]) == again, run
        assert row["scores"].keys() == data_quality.tests(lesson, run).keys()


@pytest.mark.integration
def test_no_training_set_of_the_lesson_leaks_but_those_that_should(lesson):
    from sftlib.data import decontaminate

    for experiment, sets in data_quality.training_sets(lesson, 0).items():
        for data, rows in sets.items():
            asked = data_quality.tests(lesson, data_quality.Training(experiment, data, 0))
            again = ("the true answer", "the false answer")  # the very questions of the rows
            tests = [row for name in asked.keys() - {*again} for row in asked[name]]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # many leaks: eight pages are a third of the rows
                leaks = len(decontaminate(rows, tests)[1])
            pages = int(data) if experiment == "with_leaks" else 0
            assert leaks == 20 * pages, (experiment, data)


def test_scores_of_all_seeds_are_one_spread(tmp_path):
    rows = [
        {"experiment": "e", "data": data, "scores": {"test": score}}
        for data, score in (("a", 0.5), ("b", 0.9), ("a", 0.7))
    ]
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = stored_scores("e", "test", path)
    assert {name: spread.values for name, spread in found.items()} == {"a": (0.5, 0.7), "b": (0.9,)}
    with pytest.raises(ValueError, match=r"Expected one of 'e' \(test\), found 'f'"):
        stored_scores("f", "test", path)
    with pytest.raises(ValueError, match="with the test 'other'"):
        stored_scores("e", "other", path)


def test_of_a_cell_that_trains_only_the_functions_are_taken():
    source = "def f(seed):\n    return seed + 1\n\n\nscore = train(f(0))\nprint(score)"
    assert data_quality.functions(source) == "def f(seed):\n    return seed + 1"
