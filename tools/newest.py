"""Which lessons break with the newest releases of the pinned packages; `make newest` says.

It makes an environment of its own under `work/newest`, installs the newest release of each package
of requirements.txt, and runs every lesson in it without comparing outputs. Names given as arguments
stay at their pins: `make newest KEEP="torch deepspeed"`. The course's environment is not touched.
"""

import os
import re
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

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


def first_failure(report: str) -> str:
    """The first cell that failed, and its error, from what pytest printed; empty where none did."""
    cell = re.search(r"^_+ (?:\S*::)?(Cell \d+) _+$", report, re.MULTILINE)
    error = re.search(r"^(\w+(?:Error|Exception|Warning)\b.*)$", report, re.MULTILINE)
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
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--upgrade", "pip"], check=True)
    subprocess.run([*pip, *packages], check=True)
    subprocess.run([*pip, "--no-deps", "--editable", "."], cwd=ROOT, check=True)
    frozen = subprocess.run(
        [str(python), "-m", "pip", "freeze"], capture_output=True, text=True, check=True
    )
    now = {name.lower(): version for name, version in pins(frozen.stdout).items()}
    for name, version in pinned.items():
        newest = now.get(name.lower().replace("_", "-"), "?").split("+")[0]
        if newest != version:
            print(f"{name} {version} → {newest}", flush=True)

    broken = 0
    settings = os.environ | {"PATH": f"{PLACE / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    check = [str(python), "-m", "pytest", "--nbval-lax", "--nbval-current-env"]
    check += ["--nbval-cell-timeout=600", "-q", "-p", "no:cacheprovider"]
    for lesson in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        done = subprocess.run(
            [*check, str(lesson)], cwd=ROOT, env=settings, capture_output=True, text=True
        )
        broken += done.returncode != 0
        why = first_failure(done.stdout) or done.stdout[-300:] if done.returncode else ""
        print(f"{'✗' if why else '✓'} {lesson.stem} {why}", flush=True)
    print(f"{broken} lessons break" if broken else "Every lesson runs with the newest releases")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
