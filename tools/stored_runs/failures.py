"""Train the laboratory's failures again and again: the stored runs of lesson 8 (`make sweeps`).

Takes three quarters of an hour; goes on where it was interrupted. To begin anew, delete the file.
The rules of `sftlib.experiments.diagnose` were made while looking at the runs that are `BUILT_ON`;
the others were held apart, and made when the rules were finished, to measure them.
"""

import math
from itertools import product
from pathlib import Path

from sftlib.experiments.failures import FAILURES, Training, train
from sftlib.experiments.sweep import sweep

RUNS = Path(__file__).parents[2] / "data" / "runs" / "failures.jsonl"
# Fewer examples get a higher rate: with few steps at a low rate LoRA does not learn to stop.
BUILT_ON = {
    "seed": (0, 1, 2, 3, 4),
    "examples": (320, 640, 400, 480, 960),
    "rate": (1.5, 1.0, 1.4, 1.2, 0.9),
}
HELD_APART = {"seed": (5, 6, 7), "examples": (512, 560, 800), "rate": (1.3, 1.1, 0.95)}
KEPT = ("step", "loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy", "eval_loss")
FULL_ONLY = ("no clipping",)  # LoRA's rates are others for SGD


def runs(settings: dict[str, tuple]) -> list[Training]:
    """Each failure, and a sound training, with each seed, its size and its rate."""
    return [
        Training(failure, examples, rate, lora, seed)
        for failure, lora in product(("", *FAILURES), (False, True))
        if not (lora and failure in FULL_ONLY)
        for seed, examples, rate in zip(*settings.values(), strict=True)
    ]


def sound(settings: dict[str, tuple]) -> list[Training]:
    """Sound trainings with each seed, size and rate in turn."""
    return [
        Training("", examples, rate, lora, seed)
        for seed, examples, rate, lora in product(*settings.values(), (False, True))
    ]


def stored() -> list[Training]:
    """What the file holds, in order."""
    return list(dict.fromkeys(runs(BUILT_ON) + runs(HELD_APART) + sound(HELD_APART)))


def measure(training: Training) -> dict:
    """The run's log, four digits of each figure that a rule may look at, and its score."""
    done = train(training)
    log = [
        {name: _short(line[name]) for name in KEPT if name in line}
        for line in done.log
        if "train_runtime" not in line
    ]
    return {"heldout": done.heldout, "log": log}


def _short(value: float | str) -> float | int | str:
    value = float(f"{float(value):.4g}")
    if not math.isfinite(value):
        return str(value)  # JSON has no such number
    return int(value) if value.is_integer() and value else value


if __name__ == "__main__":
    sweep(stored(), RUNS, measure)
