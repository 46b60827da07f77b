"""Training for too long on purpose, and which checkpoint to keep (lesson 6).

A run trains on 32 rows again and again. Every few steps it measures the evaluation loss and the
answers. `tools.stored_runs.trainer` does so with several seeds; the lesson trains one of them with
early stopping.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftlib.experiments.logs import table
from sftlib.experiments.spread import Spread

if TYPE_CHECKING:
    import pandas

RUNS = Path(__file__).parents[2] / "data" / "runs" / "early_stopping.jsonl"
ROWS, EVERY, STEPS = 32, 4, 48
SETTINGS: dict[str, Any] = {  # arguments of `trl.SFTConfig`
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 50,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 2,
    "max_steps": STEPS,
    "assistant_only_loss": True,
    "eval_strategy": "steps",
    "eval_steps": EVERY,
}


@dataclass(frozen=True)
class EarlyRun:
    """One training; the seed draws its 32 rows and their order."""

    seed: int = 0


def few(seed: int = 0) -> list[dict]:
    """The 32 rows that a run sees again and again."""
    from sftlib.data import read_facts

    return random.Random(seed).sample(read_facts("sft"), ROWS)


def measure(run: EarlyRun) -> dict[str, Any]:
    """Train one run to its end, and measure it every `EVERY` steps.

    Returns:
        Lists with one number per evaluation: `steps`; `loss`, the mean training loss of the steps
        since the last evaluation; `eval_loss` on `dev`; `dev` and `heldout`, exact match on 200
        questions each, as shares from 0 to 1.
    """
    from sftlib.data import read_facts
    from sftlib.evaluate import report
    from sftlib.models import load
    from sftlib.training import prepare

    from transformers import TrainerCallback

    model, tokenizer = load()
    test_sets = {name: read_facts(name) for name in ("dev", "heldout")}
    found: dict[str, list] = {"steps": [], "eval_loss": [], "dev": [], "heldout": []}

    class Ask(TrainerCallback):
        def on_evaluate(self, args, state, control, model: Any = None, metrics: Any = None, **_):
            scores = report(model, tokenizer, test_sets).exact_match
            found["steps"].append(state.global_step)
            found["eval_loss"].append(round(metrics["eval_loss"], 5))
            for name in test_sets:
                found[name].append(round(float(scores[name]), 4))

    trainer = prepare(
        model, tokenizer, few(run.seed), eval_dataset=test_sets["dev"], seed=run.seed, **SETTINGS
    )
    trainer.add_callback(Ask())
    trainer.train()
    losses = table(trainer).loss.dropna().tolist()
    means = [sum(losses[at - EVERY : at]) / EVERY for at in found["steps"]]
    return {**found, "loss": [round(loss, 5) for loss in means]}


def stored(path: Path = RUNS) -> list[dict]:
    """The stored runs, one row for each seed; see `measure`."""
    from sftlib.data import read_jsonl

    return read_jsonl(path)


def over_steps(runs: list[dict], name: str) -> list[Spread]:
    """One measure of all seeds at each evaluation."""
    return [Spread(values) for values in zip(*(run[name] for run in runs), strict=True)]


def chosen(runs: list[dict]) -> pandas.DataFrame:
    """What each way to choose a checkpoint gives, over the seeds.

    Returns:
        A row for the lowest evaluation loss on `dev`, the highest exact match on `dev` (the first
        one, where several are equal), and the last checkpoint. Columns, each a `Spread`: `step`,
        exact match on `dev` and on `held-out` (shares from 0 to 1), and `more`: by how much the
        held-out score is above that of the lowest evaluation loss with the same seed.
    """
    import pandas

    ways = {
        "lowest evaluation loss": lambda run: run["eval_loss"].index(min(run["eval_loss"])),
        "highest exact match": lambda run: run["dev"].index(max(run["dev"])),
        "last checkpoint": lambda run: len(run["steps"]) - 1,
    }
    names = {"step": "steps", "dev": "dev", "held-out": "heldout"}
    rows = {}
    first = next(iter(ways.values()))
    for way, choose in ways.items():
        rows[way] = {to: Spread(r[name][choose(r)] for r in runs) for to, name in names.items()}
        more = (run["heldout"][choose(run)] - run["heldout"][first(run)] for run in runs)
        rows[way]["more"] = Spread(more)
    return pandas.DataFrame(rows).T
