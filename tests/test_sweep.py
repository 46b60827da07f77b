"""Sweeps: runs are told apart by their settings, saved one by one, and never done twice."""

from dataclasses import asdict, fields
from pathlib import Path

from sftlib.data import read_jsonl
from sftlib.experiments import sweep as sweep_module
from sftlib.experiments.sweep import Run, select, sweep, train_and_measure
from sftlib.models import load

import pandas as pd
import pytest

from tools.stored_runs import sweeps

ROOT = Path(__file__).parents[1]


@pytest.fixture
def done(monkeypatch):
    """The runs that were really done."""
    found = []

    def measure(run, prompts=None):
        if run.seed == 9:
            raise RuntimeError("the machine went down")
        found.append(run)
        return {"heldout": run.learning_rate / (prompts or 3)}

    monkeypatch.setattr(sweep_module, "train_and_measure", measure)
    return found


def test_a_sweep_goes_on_where_it_was_interrupted(done, tmp_path):
    path = tmp_path / "new" / "runs.jsonl"
    first, broken, last = Run(0.1), Run(0.1, seed=9), Run(0.2, r=8)
    with pytest.raises(RuntimeError):
        sweep([first, broken, last], path)
    assert [row["seed"] for row in read_jsonl(path)] == [0]
    rows = sweep([last, first, last], path)
    assert done == [first, last]  # each once
    assert [row["r"] for row in rows] == [8, 0]  # in the order asked for
    assert rows[0] == asdict(last) | {"heldout": 0.06667}
    assert read_jsonl(path) == rows[::-1]
    assert sweep([Run(0.6)], path, prompts=2)[0]["heldout"] == 0.3


def test_a_sweep_goes_on_after_a_row_that_was_half_written(done, tmp_path):
    path = tmp_path / "runs.jsonl"
    first, second = Run(0.3), Run(0.6)
    whole = sweep([first, second], path)
    path.write_bytes(path.read_bytes()[:-9])
    assert sweep([first, second], path) == whole == read_jsonl(path)
    assert done == [first, second, second]


def test_the_stored_runs_are_those_of_the_script():
    for path, runs in ((sweeps.RUNS, sweeps.runs()), (sweeps.LARGER_RUNS, sweeps.LARGER)):
        settings = [field.name for field in fields(Run)]
        stored = [Run(**{name: row[name] for name in settings}) for row in read_jsonl(path)]
        assert stored == list(dict.fromkeys(runs))


def test_no_best_learning_rate_is_at_the_edge_of_its_grid():
    table = pd.DataFrame(read_jsonl(sweeps.RUNS))
    for settings, rates in sweeps.tuned():
        found = select(table, **settings)
        dev = found[found.learning_rate.isin(rates)].groupby("learning_rate").dev.mean()
        assert len(dev) == len(rates) >= 5, settings
        assert min(rates) < dev.idxmax() < max(rates), settings


def test_runs_are_selected_by_what_is_named():
    every = [Run(1e-3), Run(1e-3, seed=1), Run(2e-3), Run(1e-3, r=8), Run(1e-3, targets="mlp")]
    table = pd.DataFrame(map(asdict, every))
    assert [*select(table).index] == [0, 1, 2]
    assert [*select(table, seed=0).index] == [0, 2]
    assert [*select(table, learning_rate=1e-3).index] == [0, 1]
    assert [*select(table, r=8).index] == [3] and [*select(table, targets="mlp").index] == [4]


def test_a_run_becomes_its_peft_config(tiny):
    assert Run(1e-3).lora(*tiny) is None
    config = Run(1e-3, r=4, targets="attention", variant="dora").lora(*tiny)
    assert (config.r, config.lora_alpha, config.use_dora) == (4, 8, True)
    assert set(config.target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert Run(1e-3, r=4, alpha=2).lora(*tiny).lora_alpha == 2
    config = Run(1e-3, r=4, variant="control tokens").lora(*tiny)
    assert config.trainable_token_indices == {"embed_tokens": [2, 3]}
    assert config.target_modules == "all-linear"


@pytest.mark.integration
@pytest.mark.parametrize(
    "run", [Run(5e-4, targets="mlp", examples=32), Run(5e-3, r=2, examples=32, replay=16)]
)
def test_a_short_run_is_measured(run):
    found = train_and_measure(run, prompts=2, texts=["Kenya is in Africa.", "So is Chad."])
    assert found["steps"] == (3 if run.replay else 2)  # 16 in a step
    linear = sum(p.numel() for n, p in load()[0].named_parameters() if "mlp" in n)
    assert found["trainable"] == (28_416 if run.r else linear)
    assert all(0 <= found[name] <= 1 for name in ("dev", "heldout", "stops", "cloze", "direction"))
    assert found["perplexity"] > 1 and found["change"] > 0
    # Of two directions at most, the first has at least half of the squared length.
    assert (found["direction"] >= 0.7) == (run.r == 2)
