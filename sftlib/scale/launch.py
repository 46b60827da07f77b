"""Run a training script on several ranks of this machine, from a notebook.

`launch` starts the script once for each rank, with the environment variables that `torchrun` sets
(https://docs.pytorch.org/docs/stable/elastic/run.html): the same script runs under `torchrun`,
`deepspeed` and `accelerate launch`. It adds what a notebook needs: short output, a line about each
rank that failed, the place where a rank hangs, and no process left behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sftlib import progress_bar
from sftlib.data import read_jsonl, write_jsonl

GRACE = 10.0  # seconds in which ranks may end by themselves after one has failed
LOST = "lost the connection to a rank that had ended"
OLD = 600.0  # seconds after which the lock of a build is taken for a left-over


@dataclass
class Result:
    """What a launch gave.

    Attributes:
        ranks: how many processes ran.
        rows: the lines of JSON that ranks printed, each a dict, with its `rank` added.
        failures: a line for each rank that failed, the first to fail first; empty if none did.
        seconds: from start to end.
        logs: the folder with what each rank printed; None for a stored run.
    """

    ranks: int
    rows: list[dict] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    logs: Path | None = None

    @property
    def live(self) -> bool:
        """Whether it ran here and now, and was not read from a file."""
        return self.logs is not None


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
        ranks: how many processes. Each computes with one thread, as `torchrun` has it.
        timeout: seconds; ranks that are not ready then say where they are, and are stopped.
        env: environment variables for the ranks, besides those of this process.
        logs: folder for what ranks print, `<script>.logs` if not given. What an earlier launch
            left there is replaced.
        stored: rows of an earlier run (JSON lines), returned where DeepSpeed cannot run; with
            `SFT_DEEPSPEED=record` in the environment, this run's rows are written there.
        check: raise where a rank fails; else say so and return.

    Raises:
        LaunchError: a rank failed, or the time was up.
        FileNotFoundError, ValueError: there is no such script; ranks or timeout are not positive.
        RuntimeError: another launch is writing to the same logs.
    """
    if stored is not None and (reason := unavailable()):
        print(f"A stored run, since {reason}.")
        return Result(ranks, read_jsonl(stored))
    script = Path(script)
    if not script.is_file():
        raise FileNotFoundError(f"Expected a script, found no file {script}. Write it first.")
    if ranks < 1 or timeout <= 0:
        raise ValueError(f"Expected at least 1 rank and some seconds, found {ranks=}, {timeout=}.")
    for lock in old_builds():
        print(
            f"{lock} was left by a build that was interrupted: a rank that needs this build waits "
            "for it without end. If nothing is being built, delete it."
        )
    folder = Path(logs) if logs else script.with_suffix(".logs")
    result = Result(ranks, logs=folder)
    started = time.monotonic()
    with _owned(folder):
        with _Ranks(script, args, ranks, env or {}, folder) as running:
            result.failures = running.wait(timeout)
        result.rows = [row for rank in range(ranks) for row in _rows(folder, rank)]
    result.seconds = time.monotonic() - started
    if stored is not None and os.environ.get("SFT_DEEPSPEED") == "record":
        write_jsonl(stored, result.rows)
    if result.failures and check:
        raise LaunchError(result)
    for line in result.failures:
        print(line)
    return result


class _Ranks:
    """The processes of a launch; none of them outlives the `with` block."""

    def __init__(
        self, script: Path, args: Sequence, ranks: int, env: Mapping[str, str], folder: Path
    ) -> None:
        from torch.distributed import TCPStore

        # The store where ranks find each other. We hold it, so the system can choose a free port.
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.command = [sys.executable, "-m", "sftlib.scale.rank", str(script), *map(str, args)]
        self.folder = folder
        self.env = os.environ | _surroundings(ranks, self.store.port) | dict(env)
        self.ranks = range(ranks)
        self.processes: list[subprocess.Popen] = []
        self.codes: dict[int, int] = {}  # exit codes, in the order in which ranks ended
        self.shown = 0  # how much of rank 0's output

    def __enter__(self) -> _Ranks:
        try:
            for rank in self.ranks:
                self.processes.append(self._start(rank))
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, rank: int) -> subprocess.Popen:
        mine = {"RANK": rank, "LOCAL_RANK": rank, "SFT_RANK_NOTES": self.folder / f"rank{rank}"}
        with _log(self.folder, rank, "out", "w") as out, _log(self.folder, rank, "err", "w") as err:
            return subprocess.Popen(
                self.command,
                env=self.env | {name: str(value) for name, value in mine.items()},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,  # a group of its own, to be stopped with all its children
            )

    def __exit__(self, *_: object) -> None:
        self._signal(signal.SIGTERM)
        end = time.monotonic() + 3
        try:
            for process in self.processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0, end - time.monotonic()))
        finally:  # also if interrupted a second time
            self._signal(signal.SIGKILL)
            for process in self.processes:
                process.wait()

    def _signal(self, number: int) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)

    def wait(self, timeout: float) -> list[str]:
        """Wait until all have ended, one has failed, or the time is up; a line for each failure."""
        end, failed = time.monotonic() + timeout, False
        with _clock(len(self.ranks)) as tick:
            while len(self.codes) < len(self.ranks) and time.monotonic() < end:
                for rank, process in enumerate(self.processes):
                    if rank not in self.codes and process.poll() is not None:
                        self.codes[rank] = process.returncode
                self._show(tick)
                if not failed and any(self.codes.values()):
                    end, failed = min(end, time.monotonic() + GRACE), True
                time.sleep(0.05)
            self._show(tick)
        lines = [self._why(rank, code) for rank, code in self.codes.items() if code]
        lines.sort(key=lambda line: LOST in line)  # those that only followed come last
        if len(self.codes) < len(self.ranks) and not failed:
            lines += self._late(timeout)
        return lines

    def _show(self, tick) -> None:
        with (self.folder / "rank0.out").open("rb") as file:
            file.seek(self.shown)
            found = file.read()
        whole = found[: found.rfind(b"\n") + 1] if 0 not in self.codes else found
        self.shown += len(whole)
        lines = io.TextIOWrapper(io.BytesIO(whole), encoding="utf-8", errors="replace")
        tick([line.rstrip("\n") for line in lines if _row(line) is None])

    def _why(self, rank: int, code: int) -> str:
        note = self.folder / f"rank{rank}.error"
        if note.exists():
            found = json.loads(note.read_text())
            lost = re.search("Connection (closed|reset) by peer", found["error"])
            return f"rank {rank}: {LOST if lost else _short(found['error'])} ({found['at']})"
        if code < 0:
            name = signal.Signals(-code).name
            cause = ", as when memory runs out" if name == "SIGKILL" else ""
            return f"rank {rank}: killed by {name}{cause}"
        with _log(self.folder, rank, "err") as file:
            last = [line for line in file.read().splitlines() if line.strip()]
        return f"rank {rank}: ended with code {code}. {_short(last[-1]) if last else ''}".rstrip()

    def _late(self, timeout: float) -> list[str]:
        """Where the ranks are that have not ended."""
        waiting = [rank for rank in self.ranks if rank not in self.codes]
        for rank in waiting:
            with contextlib.suppress(ProcessLookupError):
                self.processes[rank].send_signal(signal.SIGUSR1)
        time.sleep(0.5)
        lines = [f"not ready after {timeout:g} seconds"]
        for rank in self.ranks:
            where = self._place(rank) if rank in waiting else "has ended"
            lines.append(f"rank {rank}: {where}")
        return lines

    def _place(self, rank: int) -> str:
        stack = self.folder / f"rank{rank}.stack"
        text = stack.read_text() if stack.exists() else ""
        main = re.split(r"^(?:Current thread|Thread) .*\n", text, flags=re.M)[-1]
        frames = re.findall(r'File "(.+?)", line (\d+) in (\S+)', main)
        if not frames:
            return "did not say where it is; it has perhaps only begun"
        path, line, name = frames[0]
        script = self.command[3]
        written = script.encode("ascii", "backslashreplace").decode()  # as faulthandler does
        own = [number for name, number, _ in frames if name == written]
        from_script = f", called from {Path(script).name}, line {own[0]}" if own else ""
        return f"is in {name} ({Path(path).name}, line {line}){from_script}"


def _surroundings(ranks: int, port: int) -> dict[str, str]:
    """What each rank finds in its environment."""
    import torch

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
        "TORCHDYNAMO_DISABLE": 1,  # DeepSpeed decorates with torch.compile: an import of seconds
        "PYTHONWARNINGS": "ignore::FutureWarning",
        # also where the environment of this interpreter was never activated
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        ).rstrip(os.pathsep),
    }
    if not torch.cuda.is_available():
        found["DS_ACCELERATOR"] = "cpu"
    return {name: str(value) for name, value in found.items()}


@contextlib.contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """A folder without the logs of an earlier launch, which no other launch uses meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    # The lock ends with the file that is open here, and ranks do not inherit that. The mark itself
    # stays: without it, a launch that had opened it and the next one could both hold a lock.
    with (folder / "launcher.pid").open("a+") as mark:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            deadline, owner = time.monotonic() + 1, ""
            while not owner and time.monotonic() < deadline:  # it may just be writing its number
                mark.seek(0)
                owner = mark.read()
                time.sleep(0.01)
            raise RuntimeError(
                f"Process {owner} is running a launch with the logs {folder}. "
                "Wait for it, or name another folder: launch(…, logs=…)."
            ) from None
        mark.truncate(0)
        mark.write(str(os.getpid()))
        mark.flush()
        for kind in ("out", "err", "stack", "error"):
            for old in folder.glob(f"rank[0-9]*.{kind}"):
                old.unlink()
        yield


@contextlib.contextmanager
def _clock(ranks: int):
    """Shows lines as they come and, where bars are shown, the seconds that have passed."""
    bar = progress_bar(desc=f"{ranks} ranks", bar_format="{desc}: {elapsed}", mininterval=1)

    def tick(lines: list[str]) -> None:
        for line in lines:
            bar.write(line, file=sys.stdout)
        bar.update()

    with bar:
        yield tick


def _log(folder: Path, rank: int, kind: str, mode: str = "r"):
    return (folder / f"rank{rank}.{kind}").open(mode, encoding="utf-8", errors="replace")


def _row(line: str) -> dict | None:
    if line.startswith("{"):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            return row if isinstance(row, dict) else None
    return None


def _rows(folder: Path, rank: int) -> list[dict]:
    with _log(folder, rank, "out") as file:
        found = [_row(line) for line in file]
    return [{"rank": rank} | row for row in found if row is not None]


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
    return [lock for lock in locks if time.time() - lock.stat().st_mtime > OLD]
