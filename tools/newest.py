"""Which lessons break with the newest releases of the pinned packages; `make newest` says.

It makes an environment of its own under `work/newest`, installs the newest release of each package
of requirements.txt, and runs every lesson in it without comparing outputs. At the end it says which
claims of the lessons hold, and which measured values are not those of the ledger. Names given as
arguments stay at their pins: `make newest KEEP="torch deepspeed"`. The course's environment is not
touched.
"""

import os
import re
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

from sftlib.lesson.claims import LEDGER, read_ledger

from tools import claims

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "work" / "newest"


def pins(text: str) -> dict[str, str]:
    """The packages of a requirements file with their versions."""
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", text, re.MULTILINE))


def wanted(pinned: dict[str, str], keep: Collection[str]) -> list[str]:
    """What to install: the bare name, or the pin of a package that stays."""
    if unknown := set(keep) - set(pinned):
        raise ValueError(f"Expected names of requirements.txt, found {', '.join(sorted(unknown))}.")
    return [f"{name}=={version}" if name in keep else name for name, version in pinned.items()]


def changes(pinned: dict[str, str], frozen: str) -> list[str]:
    """What `pip freeze` says of the pinned packages, where it is not the pin."""
    now = {_same(name): version.split("+")[0] for name, version in pins(frozen).items()}
    found = {name: now.get(_same(name), "not installed") for name in pinned}
    return [f"{name} {pin} → {found[name]}" for name, pin in pinned.items() if found[name] != pin]


def _same(name: str) -> str:
    """A package's name as the index compares it: case and separators do not count."""
    return re.sub(r"[-_.]+", "-", name).lower()


def command(python: str | Path) -> list[str]:
    """What runs a lesson without comparing its outputs; the notebook's path comes last."""
    lax = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=600"]
    return [str(python), "-m", "pytest", *lax, "-q", "-p", "no:cacheprovider"]


def first_failure(report: str) -> str:
    """The first cell that failed, and its error, from what pytest printed; empty where none did."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", report)  # IPython's colours
    cell = re.search(r"^_+ (?:\S*::)?(Cell \d+) _+$", plain, re.MULTILINE)
    error = re.search(r"^([\w.]+(?:Error|Exception|Exit|Warning): .*)$", plain, re.MULTILINE)
    found = [match[1][:200] for match in (cell, error) if match]
    return ": ".join(found)


def main(*keep: str) -> int:
    pinned = pins((ROOT / "requirements.txt").read_text(encoding="utf-8"))
    try:
        packages = wanted(pinned, keep)
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 2
    python = PLACE / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(PLACE)], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--upgrade", "pip"], check=True)
    if code := subprocess.run([*pip, "install", "--quiet", *packages]).returncode:
        print("The newest releases do not install together: pip says why above.", file=sys.stderr)
        return code
    frozen = subprocess.run([*pip, "freeze"], capture_output=True, text=True, check=True)
    changed = changes(pinned, frozen.stdout) or ["Each pin is the newest release"]
    print(*changed, sep="\n", flush=True)

    return int(run_lessons(python) > 0)


def run_lessons(python: str | Path) -> int:
    """Run every lesson with this Python; say which break and what becomes of their claims.

    Returns:
        how many lessons break.
    """
    broken, ledger = 0, PLACE / LEDGER
    path = f"{PLACE / 'bin'}{os.pathsep}{os.environ['PATH']}"
    settings = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "SFT_LEDGER": str(ledger)}
    lessons = claims.lessons(ROOT)
    for lesson in lessons:
        done = subprocess.run(
            [*command(python), str(lesson)], cwd=ROOT, env=settings, capture_output=True, text=True
        )
        broken += done.returncode != 0
        why = first_failure(done.stdout) or (done.stdout + done.stderr)[-300:]
        print(f"✗ {lesson.stem} {why}" if done.returncode else f"✓ {lesson.stem}", flush=True)
    print(f"{broken} lessons break" if broken else "Every lesson runs with the newest releases")
    ran = [lesson.stem for lesson in lessons]
    print("", *claims.difference(claims.stored(ROOT), read_ledger(ledger), ran), sep="\n")
    return broken


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
