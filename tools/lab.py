"""Start JupyterLab on the lessons, for this machine alone; `make lab` does it.

The token stays on: JupyterLab makes a new random one at each start and prints the whole address.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def check_port(text: str) -> int:
    """The port as a number, once it is known to be free; otherwise exit with a sentence."""
    if not text.isdecimal() or not 0 < int(text) < 65536:
        sys.exit(f"PORT must be a number from 1 to 65535, and is {text!r}. Try: make lab PORT=8889")
    with socket.socket() as trial:
        # As JupyterLab itself does: a port that was closed a moment ago counts as free.
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("127.0.0.1", int(text)))
        except OSError as problem:
            taken = problem.errno == errno.EADDRINUSE
            why = "is used by another program" if taken else f"cannot be used ({problem.strerror})"
            other = int(text) + 1 if 1024 <= int(text) < 65535 else 8889
            sys.exit(f"Port {text} {why}. Pick another one: make lab PORT={other}")
    return int(text)


def command(port: int, root: bool, display: bool) -> list[str]:
    """The call of JupyterLab."""
    return [
        *(sys.executable, "-m", "jupyterlab", "--ip=127.0.0.1", f"--port={port}"),
        "--ServerApp.port_retries=0",  # a port that is taken is an error, not a reason to move on
        f"--ServerApp.root_dir={ROOT}",  # so that a lesson's links to ../data and ../sftlib open
        "--LabApp.default_url=/lab/tree/notebooks",
        # nobody is told that a lesson was opened: no request for news or for the latest version
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--ServerApp.answer_yes=True",  # one Ctrl-C is enough, without a question
        *(["--allow-root"] if root else []),
        # Without a display, a text browser would take the terminal over.
        *([] if display else ["--no-browser"]),
    ]


def has_display(environ: Mapping[str, str], platform: str) -> bool:
    """Whether a browser can open a window here."""
    return platform == "darwin" or any(
        environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    )


def settings() -> dict[str, str]:
    """Variables for JupyterLab: no pop-up about news in a lesson, and this environment's kernel.

    And threads that spin for a short time only while they wait for each other. One training takes
    as long as with the default, and two at once take 4 seconds in place of 8 to 71. Threads that
    sleep at once (OMP_WAIT_POLICY=passive) make one training a third slower on some CPUs. `make
    threads` measures it, data/benchmarks.json has the table. Your own setting counts more.
    """
    own = any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"))
    return {
        "JUPYTER_CONFIG_PATH": str(ROOT / "tools/jupyter"),
        "JUPYTER_PREFER_ENV_PATH": "1",
        **({} if own else {"GOMP_SPINCOUNT": "1000"}),
    }


def main() -> None:
    """Become JupyterLab: no process of ours stays between it and Ctrl-C."""
    port = check_port(os.environ.get("PORT", "8888"))
    os.environ |= settings()
    (ROOT / "notebooks").mkdir(exist_ok=True)
    call = command(port, os.geteuid() == 0, has_display(os.environ, sys.platform))
    os.execv(call[0], call)


if __name__ == "__main__":
    main()
