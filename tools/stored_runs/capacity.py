"""Let the tiny base model learn random facts by heart: the stored runs of lesson 4 (`make sweeps`).

Takes a quarter of an hour; goes on where it was interrupted. To begin anew, delete the file.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sftlib.data import write_jsonl
from sftlib.experiments.capacity import Storing, store_and_measure, tuned
from sftlib.experiments.sweep import sweep

RUNS = Path(__file__).parents[2] / "data" / "runs" / "capacity.jsonl"
SEEDS = (0, 1, 2)
LONGER = 32  # epochs: twice as many
Study = tuple[Storing, tuple[float, ...]]


def studies() -> list[Study]:
    """Each setting, without its learning rate, and the rates that its search begins with."""
    full: list[Study] = [
        (Storing(0, embeddings=trained), (5e-4, 1e-3, 2e-3)) for trained in (True, False)
    ]
    lora: list[Study] = [
        (Storing(0, r=1), (5e-3, 1e-2, 2e-2)),
        (Storing(0, r=4), (2e-3, 5e-3, 1e-2)),
    ]
    lora += [(Storing(0, r=16), (1e-3, 2e-3, 5e-3)), (Storing(0, r=64), (5e-4, 1e-3, 2e-3))]
    longer: list[Study] = [(Storing(0, r=16, epochs=LONGER), (1e-3, 2e-3, 5e-3))]
    return full + lora + longer


def runs(measure: Callable[[list[Storing]], list[dict]]) -> list[Storing]:
    """For each setting a search for its learning rate with one seed, and three seeds at the best.

    Args:
        measure: does runs, or looks up what they gave.
    """
    found: list[Storing] = []
    for setting, rates in studies():
        best, searched = tuned(setting, rates, measure)
        seeds = [replace(setting, learning_rate=best, seed=seed) for seed in SEEDS]
        measure(seeds)
        found += searched + seeds
    return list(dict.fromkeys(found))


def in_file(some: list[Storing]) -> list[dict]:
    return sweep(some, RUNS, store_and_measure)


if __name__ == "__main__":
    write_jsonl(RUNS, in_file(runs(in_file)))
