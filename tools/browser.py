"""Install what the tests in a browser need, where that works without asking anybody.

`make test` calls it. The package Playwright goes into the environment; Chromium is the system's,
and is installed from Debian's packages where this runs as root. What cannot be had is said, and is
no error: the tests then say why they are skipped.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")


def chromium() -> str | None:
    """The system's Chromium or Chrome; None where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return found or (str(MAC) if MAC.exists() else None)


def missing() -> str:
    """Why no test in a browser can run here; empty where it can."""
    if importlib.util.find_spec("playwright") is None:
        return "the package playwright is not installed (make browser installs it)"
    if chromium() is None:
        return "no Chromium or Chrome was found (on Debian: sudo apt install chromium)"
    return ""


def install() -> None:
    if importlib.util.find_spec("playwright") is None:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        _try([*pip, "--no-deps", "--requirement=requirements-browser.txt"])
    if chromium() is None and shutil.which("apt-get") and os.geteuid() == 0:
        quiet = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=60"]
        if not _try([*quiet, "install", "--yes", "--no-install-recommends", "chromium"]):
            _try([*quiet, "update"])
            _try([*quiet, "install", "--yes", "--no-install-recommends", "chromium"])


def _try(command: list[str]) -> bool:
    settings = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=600
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


if __name__ == "__main__":
    install()
    why = missing()
    print(f"Tests in a browser: {f'left out, {why}' if why else f'with {chromium()}'}")
