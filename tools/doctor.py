"""Check in twenty seconds that this machine can give the course; `make doctor` does it.

Run by any Python of the system, before or after `make setup`. It changes nothing; each line that is
not ✓ says what to do.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import webbrowser
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools import environment, lab

ROOT = environment.ROOT
MEMORY_GB = 4.0  # free; the greediest lesson, two ranks of DeepSpeed beside the notebook, takes 3
WORK_GB = 1.0  # free; what the lessons write under work/
ANEW = "Run: rm -rf .venv && make setup"
SIGNS = {True: "✓", False: "✗", None: "○"}


@dataclass(frozen=True)
class Finding:
    """What a check found: `fine` is True, False, or None for "works, and could be better"."""

    fine: bool | None
    text: str

    def __str__(self) -> str:
        return f"{SIGNS[self.fine]} {self.text}"


def python() -> Finding:
    version = environment.dotted(sys.version_info[:3])
    try:
        environment.check_python(sys.version_info[:3])
        environment.check_venv_module(sys.executable)
    except environment.SetupError as problem:
        return Finding(False, str(problem))
    return Finding(True, f"Python {version}")


def packages() -> Finding:
    todo = environment.plan(ROOT)
    if todo.action != "keep":
        return Finding(False, f"packages are to be installed ({todo.reason}). Run: make setup")
    said = inside(VERSIONS)
    if said is None:
        return Finding(False, f"the environment does not start. {ANEW}")
    if wrong := said.splitlines():
        return Finding(False, f"other versions than pinned: {'; '.join(wrong[:3])}. {ANEW}")
    return Finding(True, "packages as pinned")


VERSIONS = """
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
for pin in re.findall(r"^([\\w.-]+)==([\\w.]+)", Path("requirements.txt").read_text(), re.M):
    try:
        found = version(pin[0]).split("+")[0]
    except PackageNotFoundError:
        found = "none"
    if found != pin[1]:
        print(f"{pin[0]} {found}, expected {pin[1]}")
"""


def memory() -> Finding:
    free = free_memory_gb()
    if free is None:
        return Finding(None, f"memory unknown; the lessons need {MEMORY_GB:.0f} GB")
    text = f"{free:.1f} GB of memory free"
    if free < MEMORY_GB:
        return Finding(False, f"{text}, {MEMORY_GB:.0f} are needed. Close other programs")
    return Finding(True, text)


def free_memory_gb() -> float | None:
    """What programs can still get, in GB; None where that cannot be found out."""
    if Path("/proc/meminfo").exists():
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024 / 1e9
    whole = environment.output(
        ["sysctl", "-n", "hw.memsize"]
    )  # macOS: what is there, not what is free
    return int(whole) / 1e9 if whole else None


def disk() -> Finding:
    free = shutil.disk_usage(ROOT).free / 1e9
    needed = WORK_GB if (ROOT / ".venv").exists() else environment.NEEDED_GB
    text = f"{free:.1f} GB of disk free"
    return (
        Finding(True, text)
        if free >= needed
        else Finding(False, f"{text}, {needed:.0f} are needed")
    )


def cores() -> Finding:
    count = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if count < 2:
        return Finding(None, "1 core: the lessons take about twice their minutes")
    return Finding(True, f"{count} cores")


def port() -> Finding:
    try:
        return Finding(True, f"port {lab.check_port(os.environ.get('PORT') or '8888')} is free")
    except SystemExit as problem:
        return Finding(False, str(problem))


def browser() -> Finding:
    if not lab.has_display(os.environ, sys.platform):
        return Finding(None, "no display: open the address that `make lab` prints in a browser")
    try:
        return Finding(True, f"browser {getattr(webbrowser.get(), 'name', '')}".strip())
    except webbrowser.Error:
        return Finding(None, "no browser found: open the address that `make lab` prints in one")


def training() -> Finding:
    """A kernel starts, as for a notebook, and takes one step of finetuning."""
    if environment.plan(ROOT).action != "keep":
        return Finding(None, "kernel and training: to be tried after make setup")
    found = inside(KERNEL)
    try:
        said = json.loads((found or "").splitlines()[-1])
    except (IndexError, ValueError):
        return Finding(False, f"no kernel started. {ANEW}")
    if said["error"]:
        return Finding(False, f"a kernel started, training failed: {said['error']}")
    return Finding(
        True,
        f"a kernel started ({said['kernel']:.0f} s) and finetuned a step ({said['step']:.0f} s)",
    )


KERNEL = '''
import json, time
from jupyter_client.manager import start_new_kernel
STEP = """
from sftlib.data import read_facts
from sftlib.models import load
from sftlib.training import tune
rows = read_facts("sft")[:16]
trainer = tune(*load("tiny-base"), rows, max_steps=1, output_dir="work/doctor")
print(trainer.state.log_history[0]["loss"])
"""
began = time.monotonic()
manager, client = start_new_kernel(kernel_name="python3")
kernel = time.monotonic() - began
said = []
reply = client.execute_interactive(STEP, timeout=120, output_hook=said.append)["content"]
error = "" if reply["status"] == "ok" else f"{reply['ename']}: {reply['evalue']}"[:300]
manager.shutdown_kernel(now=True)
print(json.dumps({"kernel": kernel, "step": time.monotonic() - began - kernel, "error": error}))
'''


def inside(code: str) -> str | None:
    """What code prints in the course's environment; None where it fails."""
    quiet = {**os.environ, "SFT_NO_BARS": "1", "TQDM_DISABLE": "1"}
    command = [str(ROOT / ".venv/bin/python"), "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, env=quiet, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return done.stdout if done.returncode == 0 else None


CHECKS: tuple[Callable[[], Finding], ...] = (
    *(python, packages, cores, memory, disk, port, browser, training),
)


def findings(checks: tuple[Callable[[], Finding], ...] = CHECKS) -> Iterator[Finding]:
    """Each check's finding; a check that fails is a finding, too."""
    for check in checks:
        try:
            yield check()
        except Exception as error:
            yield Finding(
                False, f"{getattr(check, '__name__', check)}: {type(error).__name__}: {error}"
            )


def main() -> int:
    began, bad = time.monotonic(), 0
    for finding in findings():
        print(finding, flush=True)
        bad += finding.fine is False
    verdict = "Ready for class" if not bad else f"{bad} to repair, see ✗ above"
    print(f"{verdict} ({time.monotonic() - began:.0f} s).")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
