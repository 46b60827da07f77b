"""Run a training script on several ranks of this machine, from a notebook.

`launch` starts the script once per rank, with the environment variables that `torchrun` sets
(https://docs.pytorch.org/docs/stable/elastic/run.html): the same script runs under `torchrun`,
`deepspeed` and `accelerate launch`. It adds what a notebook needs: short output, a line about each
rank that failed, the place where a rank hangs, and no process left behind.

It does not call `torchrun`, which imports torch before it starts the ranks: that adds 1.7 CPU
seconds, and 4 to 8 seconds on a busy machine of two cores, to each launch (torch 2.13, two ranks).
Besides, `torchrun` stops the other ranks before they can say what happened to them, waits 30
seconds for one that ignores SIGTERM, and leaves children of ranks behind after a good run.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

from sftlib import progress_bar
from sftlib.data import read_jsonl, write_jsonl

import psutil

GRACE = 10.0  # seconds in which the other ranks may end by themselves after one has failed
STOP = 3.0  # seconds in which a rank may end by itself after it was told to
ANSWER = 5.0  # seconds in which a rank that hangs may write where it is
OLD_LOCK = 600.0  # seconds after which nobody works on a build any more
LOST = "lost the connection to a rank that had ended"
KINDS = ("out", "err", "stack", "error")  # the files of a rank; it writes the last two itself


@dataclass
class Result:
    """What a launch gave.

    Attributes:
        ranks: how many were asked for.
        rows: the lines of JSON that ranks printed, each a dict, with its `rank` added.
        failures: one line per rank that failed, causes before what only followed from them; after
            a timeout, where each rank is. Empty if none failed.
        logs: the folder with what each rank printed; None for a stored run.
    """

    ranks: int
    rows: list[dict] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    logs: Path | None = None


class LaunchError(RuntimeError):
    """A rank failed, or the time was up; `result` has what there is."""

    def __init__(self, result: Result) -> None:
        super().__init__("\n".join([*result.failures, f"Full logs: {result.logs}"]))
        self.result = result


def unavailable() -> str:
    """Why DeepSpeed's CPU ranks cannot run here; empty where they can."""
    if os.environ.get("SFT_DEEPSPEED") == "stored":
        return "SFT_DEEPSPEED=stored asks for it"
    if sys.platform != "linux":
        return f"ranks on a CPU are known to work on Linux, and this is {sys.platform}"
    if importlib.util.find_spec("deepspeed") is None:
        return "DeepSpeed is not installed"
    return ""


def launch(
    script: str | os.PathLike,
    *args: Any,
    ranks: int = 2,
    timeout: float = 600,
    env: Mapping[str, str] | None = None,
    logs: str | os.PathLike | None = None,
    stored: str | os.PathLike | None = None,
    check: bool = True,
) -> Result:
    """Run a script on several ranks, show what rank 0 prints, and wait until all have ended.

    Args:
        script: a Python file.
        args: its arguments, turned into text.
        ranks: how many processes. Each computes with one thread, as under `torchrun`.
        timeout: in seconds. Ranks that still run then say where they are, and are stopped.
        env: environment variables for the ranks, besides those of this process.
        logs: folder for what ranks print, `<script>.logs` if not given. It replaces the logs of an
            earlier launch.
        stored: rows of an earlier run (JSON lines), returned where DeepSpeed cannot run. With
            `SFT_DEEPSPEED=record` in the environment, this run's rows are written there.
        check: raise an error if a rank fails; if False, print why and return.

    Raises:
        LaunchError: a rank failed, or the time was up.
        FileNotFoundError, ValueError: there is no such script; ranks or timeout are not positive.
        RuntimeError: another launch is writing to the same logs.
    """
    if stored is not None and (reason := unavailable()):
        print(f"A stored run, since {reason}.")
        return Result(ranks, read_jsonl(stored))
    script = Path(script)
    _check(script, ranks, timeout)
    folder = Path(logs) if logs else script.with_suffix(".logs")
    result = Result(ranks, logs=folder)
    with _own_logs(folder):
        result.failures = _run([str(script), *map(str, args)], ranks, timeout, env or {}, folder)
        for rank in range(ranks):
            found = map(_row, _lines((folder / f"rank{rank}.out").read_bytes()))
            result.rows += [{"rank": rank} | row for row in found if row is not None]
    if stored is not None and os.environ.get("SFT_DEEPSPEED") == "record":
        write_jsonl(stored, result.rows)
    if result.failures and check:
        raise LaunchError(result)
    for line in result.failures:
        print(line)
    return result


def _check(script: Path, ranks: int, timeout: float) -> None:
    if not script.is_file():
        raise FileNotFoundError(f"Expected a script, found no file {script}. Write it first.")
    if ranks < 1 or timeout <= 0:
        raise ValueError(f"Expected at least 1 rank and some seconds, found {ranks=}, {timeout=}.")
    for lock in old_builds():
        print(
            f"{lock} was left by a build that was interrupted: a rank that needs this build waits "
            "for it without end. If nothing is being built, delete it."
        )


def _run(
    command: Sequence[str], ranks: int, timeout: float, env: Mapping[str, str], folder: Path
) -> list[str]:
    """Start the ranks and wait for them; one line per failure. No process outlives this call."""
    from torch.distributed import TCPStore

    # The store where ranks find each other. We hold it, so that the system can choose a free port.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = os.environ | _surroundings(ranks, store.port) | dict(env)
    started: list[_Rank] = []
    try:
        for number in range(ranks):
            started.append(_Rank(number, command, env, folder))
        return _wait(started, timeout)
    finally:
        _stop(started)


class _Rank:
    """One process of a launch, and the files with what it prints and what it says about itself."""

    def __init__(
        self, number: int, command: Sequence[str], env: Mapping[str, str], folder: Path
    ) -> None:
        self.number = number
        self.script = command[0]
        self.files = {kind: folder / f"rank{number}.{kind}" for kind in KINDS}
        mine = {"RANK": number, "LOCAL_RANK": number, "SFT_RANK_NOTES": folder / f"rank{number}"}
        with self.files["out"].open("wb") as out, self.files["err"].open("wb") as err:
            self.process = psutil.Popen(
                [sys.executable, "-m", "sftlib.scale.rank_process", *command],
                env={**env, **{name: str(value) for name, value in mine.items()}},
                stdin=DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,  # a group of its own: a signal to it reaches children, too
            )

    def stop(self, number: signal.Signals) -> None:
        """Send a signal to the process and all its children, also where it has ended itself."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def failure(self) -> str:
        """Why the process has ended, in one line."""
        code = self.process.returncode
        if self.files["error"].exists():
            found = json.loads(self.files["error"].read_text())
            lost = re.search("Connection (closed|reset) by peer", found["error"])
            why = f"{LOST if lost else _short(found['error'])} ({found['at']})"
        elif code < 0:
            name = signal.Signals(-code).name
            why = f"killed by {name}{', as when memory runs out' * (name == 'SIGKILL')}"
        else:
            said = [line for line in _lines(self.files["err"].read_bytes()) if line.strip()]
            why = f"ended with code {code}. {_short(said[-1]) if said else ''}".rstrip()
        return f"rank {self.number}: {why}"

    def frames(self) -> list[tuple[str, str, str]]:
        """File, line and function of each call that the main thread is in, the innermost first."""
        text = self.files["stack"].read_text() if self.files["stack"].exists() else ""
        main = re.split(r"^(?:Current thread|Thread) .*\n", text, flags=re.M)[-1]  # it comes last
        return re.findall(r'File "(.+?)", line (\d+) in (\S+)', main)

    def answered(self) -> bool:
        """Whether the stack is whole: it is written call by call, the outermost last."""
        outermost = [name for *_, name in self.frames()][-1:]
        return outermost == ["_run_module_as_main"] or self.process.poll() is not None

    def place(self) -> str:
        """Where the process is: the innermost call, and the line of the script that led there."""
        frames = self.frames()
        if not frames:
            return "did not say where it is; it has perhaps only begun"
        path, line, name = frames[0]
        written = self.script.encode("ascii", "backslashreplace").decode()  # as faulthandler does
        own = [number for file, number, _ in frames if file == written]
        from_script = f", called from {Path(self.script).name}, line {own[0]}" if own else ""
        return f"is in {name} ({Path(path).name}, line {line}){from_script}"


def _wait(ranks: list[_Rank], timeout: float) -> list[str]:
    """Wait until all have ended, one has failed, or the time is up; one line per failure."""
    end, failed = time.monotonic() + timeout, False
    ended: list[_Rank] = []
    with _display(ranks[0].files["out"], len(ranks)) as show:
        while len(ended) < len(ranks) and time.monotonic() < end:
            ended += [r for r in ranks if r not in ended and r.process.poll() is not None]
            show()
            if not failed and any(rank.process.returncode for rank in ended):
                # The others get some time to notice it, and to say what it did to them.
                end, failed = min(end, time.monotonic() + GRACE), True
            time.sleep(0.05)
        show(last=True)
    lines = [rank.failure() for rank in ended if rank.process.returncode]
    lines.sort(key=lambda line: LOST in line)  # those that only followed come last
    if len(ended) < len(ranks) and not failed:
        lines += [f"not ready after {timeout:g} seconds", *_places(ranks, ended)]
    return lines


def _places(ranks: list[_Rank], ended: list[_Rank]) -> Iterator[str]:
    """Ask the ranks that have not ended where they are; one line per rank."""
    hanging = [rank for rank in ranks if rank not in ended]
    for rank in hanging:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.process.send_signal(signal.SIGUSR1)
    _until(lambda: all(rank.answered() for rank in hanging), ANSWER)
    for rank in ranks:
        yield f"rank {rank.number}: {rank.place() if rank in hanging else 'has ended'}"


def _stop(ranks: list[_Rank]) -> None:
    """End all ranks and their children: first ask, then force."""
    try:
        for rank in ranks:
            rank.stop(signal.SIGTERM)
        psutil.wait_procs([rank.process for rank in ranks], STOP)
    finally:  # also if interrupted a second time
        for rank in ranks:
            rank.stop(signal.SIGKILL)
        psutil.wait_procs([rank.process for rank in ranks])


def _until(condition: Callable[[], Any], seconds: float) -> Any:
    """What the condition gives as soon as that is true, or after so many seconds."""
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def _surroundings(ranks: int, port: int) -> dict[str, str]:
    """The environment variables that all ranks share."""
    import torch

    def path(first: Path, name: str) -> str:
        return os.pathsep.join([str(first), os.environ.get(name, "")]).rstrip(os.pathsep)

    found = {
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,  # the store is ours: connect to it
        "TORCHELASTIC_RESTART_COUNT": 0,
        "OMP_NUM_THREADS": 1,
        "PYTHONUNBUFFERED": 1,  # what a rank prints is shown at once
        "SFT_NO_BARS": 1,
        "TORCHDYNAMO_DISABLE": 1,  # else importing DeepSpeed loads torch.compile, for seconds
        "PYTHONWARNINGS": "ignore::FutureWarning",
        # Ranks find the commands of this Python and this sftlib, though neither its environment
        # was activated nor the package installed.
        "PATH": path(Path(sys.executable).parent, "PATH"),
        "PYTHONPATH": path(Path(__file__).parents[2], "PYTHONPATH"),
    }
    if not torch.cuda.is_available():
        found["DS_ACCELERATOR"] = "cpu"
    return {name: str(value) for name, value in found.items()}


@contextlib.contextmanager
def _own_logs(folder: Path) -> Generator[None]:
    """Keep other launches out of a folder, and remove the logs of earlier ones."""
    folder.mkdir(parents=True, exist_ok=True)
    # The lock ends when this process closes the file or dies, and ranks do not inherit it. The file
    # stays: if it were deleted, a launch that had opened it and the next could both hold a lock.
    with (folder / "launcher.pid").open("a+") as mark:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # The owner may just be writing its number.
            owner = _until(lambda: mark.seek(0) or mark.read(), 1)
            raise RuntimeError(
                f"Process {owner} is running a launch with the logs {folder}. "
                "Wait for it, or name another folder: launch(…, logs=…)."
            ) from None
        mark.truncate(0)
        mark.write(str(os.getpid()))
        mark.flush()
        for kind in KINDS:
            for old in folder.glob(f"rank[0-9]*.{kind}"):
                old.unlink()
        yield


@contextlib.contextmanager
def _display(path: Path, ranks: int) -> Generator[Callable[..., None]]:
    """Show a file as it grows, its rows aside, and the seconds passed where bars are shown."""
    bar = progress_bar(desc=f"{ranks} ranks", bar_format="{desc}: {elapsed}", mininterval=1)

    def show(last: bool = False) -> None:
        found = output.read()
        # What follows the last line end may be half a line: leave it for the next call.
        whole = len(found) if last else found.rfind(b"\n") + 1
        output.seek(whole - len(found), os.SEEK_CUR)
        for line in _lines(found[:whole]):
            if _row(line) is None:
                bar.write(line, file=sys.stdout)
        bar.update()

    with path.open("rb") as output, bar:
        yield show


def _lines(data: bytes) -> list[str]:
    # Split before decoding: text would also be split at characters like U+2028, and rows torn.
    return [line.decode(errors="replace") for line in data.splitlines()]


def _row(line: str) -> dict | None:
    if line.startswith("{"):
        with contextlib.suppress(ValueError):
            return json.loads(line)
    return None


def _short(text: str, most: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def old_builds() -> list[Path]:
    """Locks of torch's extension builds that are so old that whoever held them is gone.

    `torch.utils.file_baton.FileBaton` waits without a limit for such a file to vanish.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = Path(root) if root else Path.home() / ".cache" / "torch_extensions"
    locks = [*root.glob("*/lock"), *root.glob("*/*/lock")]
    return [lock for lock in locks if time.time() - lock.stat().st_mtime > OLD_LOCK]
