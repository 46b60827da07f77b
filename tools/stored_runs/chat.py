"""Train the stored runs of lesson 3 again and again, with several seeds (`make sweeps`).

Takes about five minutes on one core; goes on where it was interrupted. To begin anew, delete the
file. A number as an argument says how many seeds.
"""

import sys

from sftlib.experiments.chat_runs import RUNS, STUDIES, ChatRun, measure
from sftlib.experiments.sweep import sweep

SEEDS = 3


def runs(seeds: int = SEEDS) -> list[ChatRun]:
    """Each variant of each study with each seed."""
    return [
        ChatRun(study, variant, seed)
        for seed in range(seeds)
        for study, variants in STUDIES.items()
        for variant in variants
    ]


if __name__ == "__main__":
    sweep(runs(*map(int, sys.argv[1:])), RUNS, measure)
