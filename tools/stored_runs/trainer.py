"""Train the stored runs of lesson 6 again, with several seeds or repetitions (`make sweeps`).

Takes about six minutes on one core; goes on where it was interrupted. To begin anew, delete the
files. The name of one of the two studies as an argument does this one alone.
"""

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from sftlib.experiments import early_stopping, trainer_options
from sftlib.experiments.early_stopping import EarlyRun
from sftlib.experiments.sweep import sweep
from sftlib.experiments.trainer_options import OPTIONS, OptionRun

SEEDS, REPETITIONS = 5, 3


def early_runs() -> list[EarlyRun]:
    """The same training with each seed."""
    return [EarlyRun(seed) for seed in range(SEEDS)]


def option_runs() -> list[OptionRun]:
    """Each option several times. The options take turns, so that a busy minute slows them all."""
    return [OptionRun(option, number) for number in range(REPETITIONS) for option in OPTIONS]


def measured(run: OptionRun) -> dict[str, Any]:
    """What `trainer_options.measure` finds. Compiling gets a process and a cache of its own."""
    if run.option != "torch_compile":
        return trainer_options.measure(run)
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-m", "tools.stored_runs.trainer", "compile", str(run.repetition)],
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    if sys.argv[1:2] == ["compile"]:
        run = OptionRun("torch_compile", int(sys.argv[2]))
        print(json.dumps(trainer_options.measure(run)))
        sys.exit()
    wanted = sys.argv[1:] or ["early", "options"]
    if "early" in wanted:
        sweep(early_runs(), early_stopping.RUNS, early_stopping.measure)
    if "options" in wanted:
        sweep(option_runs(), trainer_options.RUNS, measured)
