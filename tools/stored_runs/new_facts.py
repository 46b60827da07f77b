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
    """Each number of facts and of wordings, taught and as a control, with each seed."""
    without = [Teaching(0, 0, seed=seed) for seed in SEEDS]
    grid = product((24, 60), (1, 2, 4, 8, 14), (False, True), SEEDS)
    return without + [Teaching(*settings) for settings in grid]


if __name__ == "__main__":
    sweep(stored(), RUNS, teach_and_measure)
