"""The studies of lesson 6: what TRL does to rows, stopping early, options, loss curves."""

import math

from sftlib.experiments import early_stopping, loss_curve, trainer_options, trainer_parts
from sftlib.experiments.early_stopping import EarlyRun
from sftlib.experiments.spread import Spread
from sftlib.experiments.trainer_options import OPTIONS, OptionRun
from sftlib.training import prepare

import pytest
import torch
from datasets import Dataset

from tools.stored_runs import trainer as script

# --- Looking inside ------------------------------------------------------------------------------


def test_each_described_step_is_seen_with_its_first_row():
    methods = Dataset.map, Dataset.filter
    rows = Dataset.from_list([{"a": 1}, {"a": 2}])
    with trainer_parts.watched() as steps:
        doubled = rows.map(lambda row: {"a": 2 * row["a"]}, desc="Tokenizing train dataset")
        doubled.map(lambda row: row)
        doubled.filter(lambda row: row["a"] > 2, desc="Dropping rows from train dataset")
    assert steps == [("Tokenizing", {"a": 2}), ("Dropping rows", {"a": 4})]
    assert (Dataset.map, Dataset.filter) == methods


def test_the_methods_come_back_after_an_error():
    method = Dataset.map
    with pytest.raises(KeyError), trainer_parts.watched():
        raise KeyError
    assert Dataset.map is method


def test_changes_name_only_the_columns_that_changed():
    steps = [("One", {"a": 1, "b": 2}), ("Two", {"a": 1, "b": 3})]
    assert trainer_parts.changes({"a": 1}, steps) == "One\n    b: 2\nTwo\n    b: 3"


def test_apart_compares_lists_and_weights():
    one, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        other.weight[0, 1] += 0.5
    assert trainer_parts.apart([1, 2.0], [1, 1.5]) == 0.5
    assert trainer_parts.apart(one, other) == pytest.approx(0.5)


def test_an_error_is_said_on_one_line_without_suggestions():
    def fails():
        raise TypeError("no argument 'x'. Did you mean 'y'?")

    assert trainer_parts.said(fails) == "TypeError: no argument 'x'"
    assert trainer_parts.said(lambda: 1) == "no error"


# --- Stopping early ------------------------------------------------------------------------------


def run(eval_loss, dev, heldout):
    return {"steps": [4, 8, 12], "eval_loss": eval_loss, "dev": dev, "heldout": heldout}


def test_a_checkpoint_is_chosen_by_loss_by_score_or_as_the_last():
    runs = [
        run([3, 2, 1], [0.1, 0.9, 0.9], [0.2, 0.8, 0.7]),
        run([1, 2, 3], [0, 0.5, 0], [0, 1, 0]),
    ]
    table = early_stopping.chosen(runs)
    assert table.loc["lowest evaluation loss", "step"] == Spread([12, 4])
    assert table.loc["highest exact match", "step"] == Spread([8, 8])
    assert table.loc["last checkpoint", "held-out"] == Spread([0.7, 0])
    assert table.loc["highest exact match", "more"].values == pytest.approx((0.1, 1))


def test_the_same_seed_draws_the_same_rows():
    assert early_stopping.few(1) == early_stopping.few(1) != early_stopping.few(2)
    assert len(early_stopping.few(0)) == early_stopping.ROWS


def test_early_stopping_learns_the_answers_alone(tiny):
    model, tokenizer = tiny
    settings = early_stopping.SETTINGS | {"eval_strategy": "no"}
    trainer = prepare(model, tokenizer, early_stopping.few(0)[:2], **settings)
    batch = next(iter(trainer.get_train_dataloader()))
    learned = [
        ids[labels != -100] for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    answers = {row["messages"][1]["content"] + "<|im_end|>" for row in early_stopping.few(0)[:2]}
    assert {tokenizer.decode(ids).strip() for ids in learned} == answers


def test_the_stored_runs_of_early_stopping_are_those_of_the_script():
    stored = early_stopping.stored()
    assert [EarlyRun(one["seed"]) for one in stored] == script.early_runs()
    steps = [*range(early_stopping.EVERY, early_stopping.STEPS + 1, early_stopping.EVERY)]
    assert all(one["steps"] == steps for one in stored)
    assert len(early_stopping.over_steps(stored, "dev")) == len(steps)


# --- Options -------------------------------------------------------------------------------------


def test_an_unknown_option_is_refused():
    with pytest.raises(ValueError, match="Expected one of"):
        OptionRun("faster")


def test_the_stored_options_are_those_of_the_script():
    assert {one.option for one in script.option_runs()} == set(OPTIONS)
    stored = trainer_options.stored()
    assert [*stored.index] == [*OPTIONS]
    counts = [sum(run.option == option for run in script.option_runs()) for option in OPTIONS]
    assert [one.count for one in stored["second"]] == counts
    assert math.isnan(stored.loc["torch_compile", "peak"])


def test_a_loss_takes_the_same_memory_on_meta_as_on_a_cpu():
    trainer_options.loss_peak(True, 1, 2, 2, torch.float32)  # the first call counts 144 more
    for fused in (True, False):
        sizes = (fused, 16, 64, 8, torch.float32)
        assert trainer_options.loss_peak(*sizes) == trainer_options.loss_peak(*sizes, "cpu")


# --- One setting changed -------------------------------------------------------------------------


def test_the_config_of_a_curve_has_its_change():
    assert loss_curve.config({"learning_rate": 1e-4}).learning_rate == 1e-4
    assert loss_curve.config().warmup_steps == 2
    with pytest.raises(TypeError):
        loss_curve.config({"warm_up": 1})
