"""Teach the tiny base model facts that it never read: the stored runs of lesson 1 (`make sweeps`).

Takes a quarter of an hour; goes on where it was interrupted. To begin anew, delete the file.
"""

from itertools import product
from pathlib import Path

from sftlib.experiments.new_facts import Teaching, teach_and_measure
from sftlib.experiments.sweep import sweep

RUNS = Path(__file__).parents[2] / "data" / "runs" / "new_facts.jsonl"
SEEDS = (0, 1, 2)


def stored() -> list[Teaching]:
    """24 facts in more and more wordings, taught and as a control; and with equal rows."""
    reworded = product((0, 1, 2, 4, 8, 14), (False, True), SEEDS)
    repeated = product((2, 4, 8, 14), SEEDS)
    return [
        *(Teaching(24, wordings, known=known, seed=seed) for wordings, known, seed in reworded),
        *(Teaching(24, 1, repeats=repeats, seed=seed) for repeats, seed in repeated),
    ]


if __name__ == "__main__":
    sweep(stored(), RUNS, teach_and_measure)
