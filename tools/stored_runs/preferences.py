"""Train the stored runs of lesson 7 again, three seeds each (`make sweeps`).

Takes about half an hour on one core; goes on where it was interrupted. To begin anew, delete the
file and `work/preferences`. `--seconds 440` begins no run after that time, and exits with code 3.
"""

import sys
import time
from functools import partial
from pathlib import Path

from sftlib.experiments.preferences import RUNS, PreferenceRun, measure
from sftlib.experiments.sweep import sweep

WORK = Path("work") / "preferences"
SEEDS = (0, 1, 2)
RATES = {  # one setting each: the methods are not tuned
    "start": 0.0,
    "SFT by the oracle": 5e-4,
    "SFT on estimates": 5e-4,
    "SFT on the best samples": 3e-4,
    "PPO": 2e-4,
    "GRPO": 3e-4,
    "DPO": 5e-5,
    "DPO + SFT loss": 2e-4,
}


def runs() -> list[PreferenceRun]:
    """What lesson 7 reads, seed by seed."""
    return [
        PreferenceRun(method, rate, seed=seed) for seed in SEEDS for method, rate in RATES.items()
    ]


def main(arguments: list[str]) -> int:
    limit = float(arguments[1]) if arguments[:1] == ["--seconds"] else float("inf")
    began = time.monotonic()
    WORK.mkdir(parents=True, exist_ok=True)
    for run in runs():
        if time.monotonic() - began > limit:
            return 3
        [row] = sweep([run], RUNS, partial(measure, folder=WORK))
        print({name: value for name, value in row.items() if name != "log"}, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
