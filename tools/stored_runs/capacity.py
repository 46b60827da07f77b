"""Let the tiny base model learn random facts by heart: the stored runs of lesson 4 (`make sweeps`).

Takes twenty minutes; goes on where it was interrupted. To begin anew, delete the file.
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
FINE = 2**0.5  # between rates that are compared with all seeds
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


# The two whose peak is narrow: half or twice the best rate stores a quarter as much, or less.
NARROW = [Storing(0, r=r) for r in (16, 64)]


def runs(measure: Callable[[list[Storing]], list[dict]]) -> list[Storing]:
    """For each setting a search for its learning rate with one seed, and three seeds at the best.

    Where the peak is narrow, the best rate and its two neighbours, a factor of `FINE` away, are
    compared with three seeds each.

    Args:
        measure: does runs, or looks up what they gave.
    """
    found: list[Storing] = []
    for setting, rates in studies():
        best, searched = tuned(setting, rates, measure)
        seeds = [replace(setting, learning_rate=best, seed=seed) for seed in SEEDS]
        if setting in NARROW:
            near = [float(f"{best * factor:.2g}") for factor in (1 / FINE, 1, FINE)]
            _, seeds = tuned(setting, near, measure, SEEDS, FINE)
        measure(seeds)
        found += searched + seeds
    return list(dict.fromkeys(found))


def in_file(some: list[Storing]) -> list[dict]:
    return sweep(some, RUNS, store_and_measure)


if __name__ == "__main__":
    write_jsonl(RUNS, in_file(runs(in_file)))
