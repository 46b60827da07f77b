"""The figures of a training follow from each other as we say, in a real run and a published one."""

import json
import math

from sftlib.data import read_facts
from sftlib.metrics import explain, table
from sftlib.models import load
from sftlib.training import tune

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import TrainerState
from transformers.trainer_utils import TrainOutput

PUBLISHED = TrainOutput(
    global_step=2,
    training_loss=9.432311534881592,
    metrics={
        "train_runtime": 2.921,
        "train_samples_per_second": 0.685,
        "train_steps_per_second": 0.685,
        "total_flos": 18722451456.0,
        "train_loss": 9.432311534881592,
        "epoch": 1.0,
    },
)
LOSSES = [{"loss": 9.5891, "step": 1}, {"loss": 9.2756, "step": 2}]


@pytest.fixture(scope="module")
def run():
    model, tokenizer = load()
    rows = [{"messages": row["messages"]} for row in read_facts("sft")[:56]]
    return tune(
        model,
        tokenizer,
        Dataset.from_list(rows),
        per_device_train_batch_size=16,
        num_train_epochs=2,
        logging_steps=3,
    )


def line(step, **values):
    return {"step": step, "epoch": step / 10, **values}


def test_the_published_figures_follow_from_each_other():
    found = explain(PUBLISHED, LOSSES)
    assert found.loc["train_steps_per_second", "follows from"] == "2 / 2.921 s = 0.685"
    assert "= 2 rows; a step had 1.0" in found.loc["train_samples_per_second", "follows from"]
    assert "mean of 2 logged losses = 9.43235" in found.loc["training_loss", "follows from"]
    assert found.loc["epoch", "follows from"] == "1 whole"
    assert found.loc["total_flos", "value"] == 6 * 86_678_016 * 36
    assert "train_loss" not in found.index


def test_a_real_runs_figures_follow_from_each_other(run):
    log, steps = run.state.log_history, run.state.global_step
    output = TrainOutput(steps, log[-1]["train_loss"], {**log[-1]})
    found = explain(output, run)
    assert steps == 8 and found.loc["training_loss", "value"] == log[-1]["train_loss"]
    assert "steps 7 to 8 were not logged" in found.loc["training_loss", "follows from"]
    assert "= 112 rows; a step had 14.0" in found.loc["train_samples_per_second", "follows from"]
    rows = table(run)
    assert rows.index.tolist() == [3, 6] and rows.columns[:4].tolist() == [
        *("epoch", "loss", "grad_norm", "learning_rate")
    ]
    assert "total_flos" not in rows


def test_a_log_is_read_from_wherever_it_is(run, tmp_path):
    path = tmp_path / "trainer_state.json"
    run.state.save_to_json(str(path))
    expected = table(run)
    for log in (run.state, run.state.log_history, path, str(path), json.loads(path.read_text())):
        assert table(log).equals(expected)


def test_evaluation_stands_beside_its_step_or_on_its_own():
    log = [line(2, loss=1.0), line(2, eval_loss=1.5), line(3, eval_loss=1.4), line(4, loss=0.5)]
    rows = table(log)
    assert rows.index.tolist() == [2, 3, 4]
    assert rows.loc[2, ["loss", "eval_loss"]].tolist() == [1.0, 1.5]
    assert math.isnan(rows.loc[3, "loss"]) and rows.loc[3, "eval_loss"] == 1.4


def test_what_was_done_again_after_a_resumption_counts_once():
    before = [line(s, loss=float(s)) for s in (1, 2, 3, 4, 5)] + [line(5, eval_loss=9.0)]
    rows = table(before + [line(s, loss=10.0 * s) for s in (3, 4)])
    assert rows.loss.tolist() == [1, 2, 30, 40] and rows.get("eval_loss") is None


def test_broken_numbers_stay_visible_and_printed_ones_are_read():
    rows = table([{"loss": "1.5", "epoch": "0.1"}, {"loss": "nan"}, {"loss": math.inf}])
    assert rows.index.tolist() == [1, 2, 3] and rows.loss[1] == 1.5
    assert math.isnan(rows.loss[2]) and rows.loss[3] == math.inf
    assert "not a finite number" in explain((3, math.nan, {})).loc["training_loss", "follows from"]


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ([], "at least one line that holds a loss, found 0"),
        ([line(1, eval_loss=1.0)], "found 1 without"),
        (TrainerState(), "at least one line"),
        (7, "found int"),
        ([line(1, loss=1.0), "loss"], "Line 2: expected a dictionary, found str"),
        ([line(1, loss="low")], "Line 1: expected a number for loss, found 'low'"),
        ([line(1, loss=None)], "expected a number for loss, found None"),
        ([line(math.inf, loss=1.0)], "expected a whole step, found inf"),
        ([line(1.5, loss=1.0)], "expected a whole step, found 1.5"),
        ([line(1, loss=1.0), {"loss": 2.0}], "found none in line 2"),
    ],
)
def test_a_log_that_is_none_says_so(log, message):
    with pytest.raises(ValueError, match=message):
        table(log)


@pytest.mark.parametrize("output", [None, 3, (1, 2), ("a", 1.0, {}), (1, 1.0, 5), (1, 1.0, None)])
def test_what_is_no_train_output_says_so(output):
    with pytest.raises(ValueError, match=r"what trainer.train\(\) returns"):
        explain(output)


NUMBER = st.one_of(st.floats(), st.integers(-9, 9), st.text(max_size=3), st.none())
LINE = st.dictionaries(st.sampled_from(["step", "loss", "eval_loss", "grad_norm", "x"]), NUMBER)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(LINE, max_size=6))
def test_any_log_gives_a_table_or_a_clear_error(log):
    try:
        rows = table(log)
    except ValueError as error:
        assert "xpected" in str(error)
    else:
        assert rows.index.is_monotonic_increasing and rows.index.is_unique and "loss" in rows


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 5), st.floats(), st.dictionaries(st.text(max_size=9), st.floats()))
def test_any_output_is_explained(steps, loss, metrics):
    names = ["train_steps_per_second", "train_samples_per_second", "total_flos", "epoch"]
    found = explain((steps, loss, metrics | dict.fromkeys(names, loss) | {"train_runtime": 0.0}))
    assert {"global_step", "training_loss", "epoch"} <= set(found.index)
