"""After the set-up nothing needs a network: lesson 1 runs where no interface is up."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A namespace of its own has one interface, loopback, and that is down.
ALONE = ["unshare", "--net", *([] if os.geteuid() == 0 else ["--map-root-user"])]
PROBE = f"""
import socket, sys
try:
    socket.create_connection(("127.0.0.1", 9), 1)
except OSError as error:
    sys.exit(error.errno != {errno.ENETUNREACH})
sys.exit(1)
"""


def unavailable() -> str:
    """Why there can be no place without a network here; empty where there can."""
    if not shutil.which("unshare"):
        return "there is no `unshare` (Linux has it)"
    done = subprocess.run([*ALONE, sys.executable, "-c", PROBE], capture_output=True, text=True)
    return f"no network namespace can be made: {done.stderr.strip()}" if done.returncode else ""


@pytest.mark.nightly
@pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "-")
def test_lesson_1_runs_without_any_network():
    command = [*ALONE, sys.executable, "-m", "tools.sections", "whole", "01"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "✓ 01_what_is_sft, from top to bottom" in done.stdout
