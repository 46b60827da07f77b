"""How should OpenMP's threads wait? The same 20 SFT steps, alone and two such processes at once.

PyTorch computes with one thread per core. Between two operations these threads wait for the next
one. By default they spin: they keep their core busy, so that they start sooner. Where another
program wants the core, it has to wait for threads that do nothing.

    make threads                # measure each setting three times, in turns; print the medians
    make threads ARGS=--store   # keep them in data/benchmarks.json, under "threads" and the machine

Where the result is used: `tools/lab.py` sets GOMP_SPINCOUNT for lessons, `conftest.py` sets
OMP_NUM_THREADS for tests.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
STORE = ROOT / "data" / "benchmarks.json"
SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},  # sleep at once
    **{f"GOMP_SPINCOUNT={n}": {"GOMP_SPINCOUNT": str(n)} for n in (0, 1000, 10_000)},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
OURS = {name for setting in SETTINGS.values() for name in setting}
TURNS, STEPS = 3, 20


def train(steps: int) -> float:
    """Seconds of so many SFT steps of the tiny base, with `tune` as it is."""
    from sftlib.data import read_facts
    from sftlib.models import load
    from sftlib.training import tune

    from datasets import Dataset

    rows = [{"messages": row["messages"]} for row in read_facts("sft")]
    trainer = tune(*load(), Dataset.from_list(rows), max_steps=steps)
    return trainer.state.log_history[-1]["train_runtime"]


def wait_and_train(steps: int) -> None:
    """In a process of its own: be ready, wait for a line, print the seconds."""
    train(1)  # imports, and what only the first step costs
    print("ready", flush=True)
    sys.stdin.readline()
    print(train(steps), flush=True)


def seconds(setting: dict[str, str], processes: int, steps: int) -> float:
    """Of the slowest of so many processes that train at the same time."""
    kept = {name: value for name, value in os.environ.items() if name not in OURS}
    command = [sys.executable, "-m", "tools.threads", "--child", "--steps", str(steps)]
    environment = {**kept, "SFT_NO_BARS": "1", **setting}
    started = [_start(command, environment) for _ in range(processes)]
    try:
        for process in started:
            if (said := _read(process)) != "ready":
                raise RuntimeError(f"Expected a process that is ready to train, it said {said!r}.")
        for process in started:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return max(float(_read(process)) for process in started)
    finally:
        for process in started:
            process.kill()
            process.communicate()


def _start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)


def _read(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def measure(turns: int = TURNS, steps: int = STEPS) -> dict:
    """Of each setting the median seconds alone and with two processes at once.

    Settings take turns, so that what else the machine does hits all of them alike.
    """
    spent = {name: {"alone": [], "two_at_once": []} for name in SETTINGS}
    for turn in range(1, turns + 1):
        for name, setting in SETTINGS.items():
            alone, both = (seconds(setting, processes, steps) for processes in (1, 2))
            spent[name]["alone"].append(alone)
            spent[name]["two_at_once"].append(both)
            print(f"turn {turn}, {name}: {alone:.1f} s, {both:.1f} s", flush=True)
    return {
        "steps": steps,
        "turns": turns,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
        "seconds": {
            name: {way: round(statistics.median(found), 2) for way, found in ways.items()}
            for name, ways in spent.items()
        },
    }


def show(figures: dict) -> None:
    print(f"seconds of {figures['steps']} SFT steps, medians of {figures['turns']}")
    print(f"{'':24} {'alone':>6} {'two at once':>12}")
    for name, found in figures["seconds"].items():
        print(f"{name:24} {found['alone']:6.1f} {found['two_at_once']:12.1f}")


def store(figures: dict, machine: str, path: Path = STORE) -> None:
    """Beside the tables of other machines: which setting is best depends on the CPU."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept.setdefault("threads", {})[machine] = figures
    path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--store", action="store_true", help=f"keep the table in {STORE.name}")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        wait_and_train(args.steps)
        return
    figures = measure(args.turns, args.steps)
    show(figures)
    if args.store:
        from sftlib.experiments.sweep import machine

        store(figures, machine())


if __name__ == "__main__":
    main()
