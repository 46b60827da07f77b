"""Run each section of the lessons after the set-up cell alone, as after a restart in class.

`make sections` does it (NB=01 for one lesson). Each section runs in a process of its own, forked
from one that has imported the large libraries: a kernel's shell runs the set-up cell, then the
section's cells; what these need of earlier ones is run by `sftlib.lesson`. Each begins in a copy of
the course whose `work/` is empty, as on a machine that never ran the lesson. A cell that fails is
named. With `whole` before the number, the lesson is run from top to bottom instead.
"""

import contextlib
import io
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

import sftlib  # noqa: F401  (before the libraries below: it quiets them)

import datasets  # noqa: F401
import peft  # noqa: F401
import transformers  # noqa: F401
import trl  # noqa: F401

from tools import copies, notebooks

QUIET = {**notebooks.SETTINGS, "MPLBACKEND": "agg"}


def run(notebook: Path, cells: list[dict]) -> str:
    """Which cell fails, and with what; empty where none does. In a copy of the course."""
    with tempfile.TemporaryDirectory() as folder:
        copy = copies.course(Path(folder), "notebooks")
        return _forked(copy / "notebooks" / notebook.name, cells)


def _forked(notebook: Path, cells: list[dict]) -> str:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            said = _failure(notebook, cells)
        except BaseException:
            said = traceback.format_exc()
        os.write(write, said.encode()[:60_000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        said = answer.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    return said or (f"the process ended with {status}" if status else "")


def _failure(notebook: Path, cells: list[dict]) -> str:
    from IPython.core.interactiveshell import InteractiveShell

    os.environ |= QUIET
    os.chdir(notebook.parent)
    silent = io.StringIO()
    shell = InteractiveShell.instance()
    for cell in cells:
        with contextlib.redirect_stdout(silent):
            result = shell.run_cell("".join(cell["source"]), cell_id=cell["id"])
        if not result.success and "raises-exception" not in cell["metadata"].get("tags", []):
            error = result.error_in_exec or result.error_before_exec
            return f"{cell['id']}: {type(error).__name__}: {str(error)[:300]}"
    return ""


def main(*words: str) -> int:
    failed, whole, number = 0, "whole" in words, "".join(w for w in words if w != "whole")
    for notebook in notebooks.find(number):
        if notebook.parent != notebooks.FOLDER:  # solutions have no sections
            continue
        parts = {
            name: [cell for cell in cells if cell["cell_type"] == "code"]
            for name, cells in notebooks.sections(notebook).items()
        }
        if whole:
            runs = {"from top to bottom": sum(parts.values(), [])}
        else:
            set_up = parts.pop("Set-up")
            runs = {name: set_up + cells for name, cells in parts.items() if cells}
        for name, cells in runs.items():
            began = time.monotonic()
            why = run(notebook, cells)
            failed += bool(why)
            seconds = time.monotonic() - began
            print(
                f"{'✗' if why else '✓'} {notebook.stem}, {name} ({seconds:.0f} s) {why}", flush=True
            )
    print(f"{failed} failed" if failed else "Nothing failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
