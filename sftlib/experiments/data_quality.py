"""What flaws of the training data cost: the stored runs of lesson 2.

`make sweeps` trains each training set of the lesson with several seeds
(`tools.stored_runs.data_quality`), and writes `data/runs/data_quality.jsonl`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sftlib.data.files import read_jsonl
from sftlib.experiments.spread import Spread

RUNS = Path(__file__).parents[2] / "data" / "runs" / "data_quality.jsonl"


@dataclass(frozen=True)
class Training:
    """One training: on one of the sets of an experiment, with one seed.

    Args:
        experiment: the lesson's function that makes the training sets, by its name.
        data: the name of the training set.
        seed: of the rows that are drawn or changed, and of their order in training.
        steps: optimizer steps of 16 rows.
    """

    experiment: str
    data: str
    seed: int
    steps: int = 30


def stored_scores(
    experiment: str, test: str = "held-out", path: str | os.PathLike = RUNS
) -> dict[str, Spread]:
    """What each training set of an experiment scored: its name → exact match, a value per seed.

    Args:
        experiment: the lesson's function that makes the training sets, by its name.
        test: the test set that was asked.

    Raises:
        ValueError: there are no stored runs of this experiment with this test set.
    """
    rows = read_jsonl(path)
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["experiment"] == experiment and test in row["scores"]:
            found.setdefault(row["data"], []).append(row["scores"][test])
    if not found:
        raise ValueError(
            f"Expected one of {_known(rows)}, found {experiment!r} with the test {test!r}. Name "
            "another one, or train it: python -m tools.stored_runs.data_quality."
        )
    return {name: Spread(scores) for name, scores in found.items()}


def _known(rows: Sequence[dict]) -> str:
    """Each experiment with its test sets."""
    known: dict[str, list[str]] = {}
    for row in rows:
        known[row["experiment"]] = list(row["scores"])
    return "; ".join(f"{name!r} ({', '.join(tests)})" for name, tests in known.items()) or "none"
