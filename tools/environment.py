"""Make and repair the course's environment, `.venv`.

Run by any Python of the system (`make setup` does it), so: standard library only, and nothing
that Python 3.8 cannot parse, because an old Python must be able to say that it is too old.

The file `.venv/sft-stamp.json` says for what the environment was made. It is written last, so an
environment without it is half-made and is made again; one whose stamp still fits is left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
INPUTS = ("requirements.txt", "constraints.txt", "pyproject.toml")

# Found by asking pip for wheels of every pin, for Linux and for macOS on Apple silicon, with
# `pip install --dry-run --no-deps --only-binary=:all: --python-version 3.x -r constraints.txt`
# (DeepSpeed, pure Python and published as source, apart). numpy, pandas, torch, transformers and
# trl begin at 3.11; torch has no wheel for 3.15; networkx excludes 3.14.1.
OLDEST, NEWEST, EXCLUDED = (3, 11), (3, 14), ((3, 14, 1),)
NEEDED_GB = 4.0


class SetupError(Exception):
    """What is wrong and what to do about it, in words for the person at the keyboard."""


@dataclass(frozen=True)
class Plan:
    """What has to be done: "keep", "install" (in place) or "make" (from nothing), and why."""

    action: str
    reason: str = ""


# --- Is this machine able to hold the environment? -----------------------------------------------


def check_python(version: tuple[int, ...]) -> None:
    """Refuse a Python for which the pinned packages have no wheels."""
    if OLDEST <= version[:2] <= NEWEST and version[:3] not in EXCLUDED:
        return
    found = [name for name in candidates() if runs(name)]
    hint = f"Run: make setup PYTHON={found[0]}" if found else "Install one, then run: make setup"
    raise SetupError(
        f"The course needs Python {dotted(OLDEST)} to {dotted(NEWEST)} (not 3.14.1), and this is "
        f"Python {dotted(version[:3])}. {hint}"
    )


def candidates() -> list[str]:
    """Names under which a supported Python may be installed, newest first."""
    return [f"python3.{minor}" for minor in range(NEWEST[1], OLDEST[1] - 1, -1)]


def runs(python: str) -> bool:
    """Whether the command starts; a pyenv shim may exist and still lead nowhere."""
    return bool(shutil.which(python)) and output([python, "-c", ""]) is not None


def check_venv_module(python: str) -> None:
    """Debian and Ubuntu leave ensurepip out of python3; say which package brings it."""
    if output([python, "-c", "import ensurepip, venv"]) is None:
        raise SetupError(
            f"{python} cannot make an environment: its modules venv and ensurepip are missing. "
            "On Debian or Ubuntu run: sudo apt install python3-venv  Then: make setup"
        )


def check_disk(folder: Path, needed_gb: float = NEEDED_GB) -> None:
    """Refuse to start an installation that would fill the disk."""
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < needed_gb:
        raise SetupError(
            f"The environment needs about {needed_gb:.0f} GB, and the disk of this folder has "
            f"{free_gb:.1f} GB free. Make room, then run: make setup"
        )


# --- What state is .venv in? ---------------------------------------------------------------------


def plan(root: Path, wanted: str | None = None) -> Plan:
    """Compare `.venv` with its stamp; `wanted` is the Python asked for, such as "3.12"."""
    venv, stamp = root / ".venv", read_stamp(root)
    if not os.path.lexists(venv):
        return Plan("make", "there is none yet")
    if stamp is None:
        return Plan("make", "an earlier set-up did not finish")
    if stamp["root"] != str(root):
        return Plan("make", "this folder was moved or copied")
    python = output([str(venv / "bin/python"), "-I", "-c", PROBE])
    if python is None:
        return Plan("make", "its Python or its pip is missing")
    if python != stamp["python"]:
        return Plan("make", f"it was made with Python {stamp['python']}, and has {python} now")
    if wanted not in (None, python):
        return Plan("make", f"it has Python {python}, and {wanted} was asked for")
    changed = [name for name in INPUTS if stamp[name] != fingerprint(root / name)]
    return Plan("install", f"{' and '.join(changed)} changed") if changed else Plan("keep")


PROBE = "import sys, pip; print('%d.%d' % sys.version_info[:2])"


def stamp_for(root: Path, python: str) -> dict[str, str]:
    """Everything on which the environment depends."""
    files = {name: fingerprint(root / name) for name in INPUTS}
    return {"root": str(root), "python": python, **files}


def read_stamp(root: Path) -> dict[str, str] | None:
    """The stamp of a finished environment; None where there is none that can be used."""
    try:
        stamp = json.loads((root / ".venv/sft-stamp.json").read_text())
        return stamp if stamp.keys() == {"root", "python", *INPUTS} else None
    except (OSError, ValueError, AttributeError):
        return None


def write_stamp(root: Path) -> None:
    """Say that the environment is complete, all at once or not at all."""
    stamp = root / ".venv/sft-stamp.json"
    draft = stamp.with_suffix(".draft")
    draft.write_text(json.dumps(stamp_for(root, dotted(sys.version_info[:2])), indent=1))
    os.replace(draft, stamp)


def fingerprint(path: Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- Make it -------------------------------------------------------------------------------------


def ensure(root: Path = ROOT, wanted: str | None = None) -> Plan:
    """Leave a complete `.venv` behind; do nothing where there is one."""
    if plan(root, wanted).action == "keep":
        return Plan("keep")
    with locked(root) as lock:
        todo = plan(root, wanted)  # again: somebody else may just have made it
        if todo.action == "make":
            make(root, todo.reason)
        if todo.action != "keep":
            install(root, todo, lock)
    return todo


def make(root: Path, reason: str) -> None:
    """An empty environment, in place of whatever was there."""
    check_python(sys.version_info[:3])
    check_venv_module(sys.executable)
    venv = root / ".venv"
    remove(venv)
    check_disk(root)
    say(f"Making .venv with Python {dotted(sys.version_info[:3])}: {reason}.")
    run([sys.executable, "-m", "venv", str(venv)], root, None)


def install(root: Path, todo: Plan, lock: IO[str]) -> None:
    """Install the pins, then stamp the environment as complete."""
    if todo.action == "install":
        say(f"Updating .venv: {todo.reason}.")
    stamp = root / ".venv/sft-stamp.json"
    if stamp.exists():
        os.replace(stamp, stamp.with_suffix(".before"))
    pip = [str(root / ".venv/bin/python"), "-m", "pip", "install"]
    say("Fetching and installing the packages. The first time, this takes some minutes.")
    started = time.monotonic()
    try:
        run([*pip, "--constraint=constraints.txt", "pip"], root, lock)
        # From 24.1 on, pip can write its progress in a form that is made to be read by a program.
        options = output([*pip, "--help"]) or ""
        raw = ["--progress-bar=raw"] if re.search(r"\braw\b", options) else []
        run([*pip, *raw, "--requirement=requirements.txt"], root, lock)
    except BaseException:
        untouched(root)
        raise
    write_stamp(root)
    stamp.with_suffix(".before").unlink(missing_ok=True)
    say(f"The environment is ready ({time.monotonic() - started:.0f} s).")


def untouched(root: Path) -> None:
    """Give a failed update its stamp back, if nothing was installed: the next one goes on there."""
    before, log = root / ".venv/sft-stamp.before", root / ".venv/setup.log"
    began = log.exists() and "Installing collected packages" in log.read_text(errors="replace")
    if before.exists() and not began:
        os.replace(before, before.with_suffix(".json"))


def run(command: list[str], root: Path, lock: IO[str] | None) -> None:
    """Run a step, show how far it is, and turn a failure into advice."""
    log = root / ".venv/setup.log"
    scratch = root / ".venv/tmp"  # /tmp is small on some machines
    scratch.mkdir(parents=True, exist_ok=True)
    settings = {"PIP_USER": "0", "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            cwd=root,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **settings, "TMPDIR": str(scratch)},
            # pip holds the lock as well: should this program be killed, nobody else starts
            # on the same folder while its pip is still at work.
            pass_fds=[lock.fileno()] if lock else [],
        )
        try:
            watch(process, log, root)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    shutil.rmtree(scratch, ignore_errors=True)
    if process.returncode:
        raise SetupError(advice(log.read_text(errors="replace")))


def watch(process: subprocess.Popen, log: Path, root: Path) -> None:
    """Until the process ends, say how far it is: on one line, or twice a minute in a log."""
    live, started = sys.stdout.isatty(), time.monotonic()
    pause = 0.5 if live else 30.0
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(pause)
            break
        text = progress(log.read_text(errors="replace"), root)
        line = f"  {text} ({time.monotonic() - started:.0f} s)"
        say(f"\r{line:<78}" if live else line, end="" if live else "\n")
    if live:
        say("\r" + " " * 78, end="\r")


def progress(log: str, root: Path) -> str:
    """How far pip is, read from its log and from what lies in the environment."""
    pins = (root / "constraints.txt").read_text().splitlines()
    total = sum("==" in pin and not pin.startswith("#") for pin in pins)
    if "Installing collected packages" in log:
        done = len(list((root / ".venv").glob("lib/*/site-packages/*.dist-info")))
        return f"installing, {done} of about {total} packages"
    found = len(re.findall(r"^(?:Collecting|Processing) ", log, re.M))
    text = f"fetching, {found} of about {total} packages"
    files = re.findall(r"Downloading (\S+)[^\n]*\n(?:Progress (\d+) of (\d+)\n)*", log)
    if files and files[-1][2]:
        name, got, size = files[-1]
        text += f", {name.split('-')[0]} {100 * int(got) // max(int(size), 1)} %"
    return text


NETWORK = re.compile(
    r"Connection(Error| refused| aborted| broken)|name resolution|resolve host|timed? ?out"
    r"|unreachable|SSLError|ProxyError|HTTP error|Max retries|from versions: none",
    re.IGNORECASE,
)


def advice(log: str) -> str:
    """The last lines of a failed step, and what to do about it."""
    if "No space left" in log:
        todo = "The disk is full. Make room, then run: make setup"
    elif NETWORK.search(log):
        todo = (
            "The package index could not be reached. Check the network (behind a proxy, set "
            "HTTPS_PROXY), then run: make setup"
        )
    else:
        todo = "Correct what these lines say, then run: make setup"
    return "\n".join(["Setting up failed. It ended with:", *log.splitlines()[-8:], "", todo])


@contextlib.contextmanager
def locked(root: Path) -> Generator[IO[str]]:
    """One set-up at a time in this folder."""
    with (root / ".venv.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another set-up is at work in this folder; waiting until it has finished.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


# --- Small helpers -------------------------------------------------------------------------------


def output(command: list[str]) -> str | None:
    """What a command prints; None where it cannot be started or fails."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:
        return None
    return done.stdout.decode().strip() if done.returncode == 0 else None


def remove(path: Path) -> None:
    """Remove a folder; of a link, the link alone."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def say(text: str, end: str = "\n") -> None:
    print(text, end=end, flush=True)


def main() -> int:
    """Make the environment; 0 when it is there, otherwise one clear message and 1."""
    # Only a Python asked for by name replaces the one that .venv already has.
    wanted = dotted(sys.version_info[:2]) if os.environ.get("PYTHON") else None
    try:
        if ensure(ROOT, wanted).action == "keep":
            say(".venv is up to date.")
    except (SetupError, OSError) as problem:
        print(f"\n{problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. To go on, run: make setup", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
