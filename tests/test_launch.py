"""Ranks find each other, say why they failed or where they hang, and leave nothing behind."""

import fcntl
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sftlib.scale import launch as launch_module
from sftlib.scale.launch import LaunchError, launch, old_builds, unavailable

import psutil
import pytest

ROOT = Path(__file__).parents[1]
QUICK = {"DS_ACCELERATOR": ""}  # else each rank imports deepspeed, which takes seconds
KINDS = ("out", "err", "stack", "error")
LOST = launch_module.LOST
JOIN = """
    import json, os, sys, time
    import torch, torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()

    def total(value):
        tensor = torch.tensor(float(value))
        dist.all_reduce(tensor)  # meet
        return tensor.item()
"""
SLEEP = """
    import os, pathlib, signal, subprocess, sys, time

    def nap():
        while True:
            time.sleep(0.1)  # here
"""
READY = """
    pathlib.Path(__file__).with_name("ready" + os.environ["RANK"]).touch()
    print("ready")
    nap()
"""
CHILD = "    subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)', __file__])\n"
PARENT = SLEEP + CHILD + READY
SAVES = (
    SLEEP
    + "    signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('saved')))\n"
    + CHILD
    + READY
)
# Its child ignores SIGTERM, too.
STUBBORN = SLEEP + "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + CHILD + READY
# A notebook's kernel, in short. `signal`: in a shell's background SIGINT is ignored.
LAUNCHER = """
import signal, sys
from sftlib.scale.launch import launch
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    launch(sys.argv[1], env={"DS_ACCELERATOR": ""}, timeout=99)
except KeyboardInterrupt:
    print("interrupted")
"""
gloo = pytest.mark.skipif(sys.platform != "linux", reason="launch promises gloo on Linux alone")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """Nothing here depends on how this machine is set up."""
    for name in ("SFT_DEEPSPEED", "PYTHONUNBUFFERED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "builds"))


@pytest.fixture
def script(tmp_path):
    def write(text, name="work.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return write


def run(script, *args, **options):
    return launch(script, *args, **{"env": QUICK, "timeout": 60} | options)


def failures(script, *args, **options):
    """The lines about a launch that fails, and nothing is left of it."""
    with pytest.raises(LaunchError) as error:
        run(script, *args, **options)
    result = error.value.result
    assert str(error.value) == "\n".join([*result.failures, f"Full logs: {result.logs}"])
    assert result.logs.is_dir()
    assert left(script.parent) == []
    return result.failures


def line(script, mark="# here"):
    """The number of the line with this mark."""
    lines = script.read_text(encoding="utf-8").splitlines()
    return 1 + next(index for index, text in enumerate(lines) if mark in text)


def running(folder):
    """The processes with this folder in their command line.

    A process that has ended may still be listed until it is reaped, but without a command line.
    """
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(str(folder) in part for part in process.info["cmdline"] or [])
    ]


def left(folder, seconds=5):
    """The processes that still run after some seconds: on a busy machine, ending takes a while."""
    until(lambda: not running(folder), seconds)
    return running(folder)


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def python(code, *args, **options):
    """Another Python that has the `sftlib` of this folder, whatever is installed."""
    options = {"env": os.environ | {"PYTHONPATH": str(ROOT)}, "cwd": ROOT} | options
    return subprocess.Popen(
        [sys.executable, "-u", "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


@pytest.fixture
def launcher(script, tmp_path):
    """Another process that launches a script, as soon as its two ranks are ready."""
    started = []

    def start(text):
        path = script(text)
        process = python(LAUNCHER, path)
        started.append(process)
        assert process.stdout.readline() == "ready\n"  # shown while the ranks still run
        assert until(lambda: all((path.parent / f"ready{rank}").exists() for rank in range(2)))
        assert len(running(path.parent)) >= 3
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
    for process in running(tmp_path):  # none, unless a test has failed
        process.kill()


# Ranks at work


def test_ranks_find_their_numbers_arguments_and_threads(script, capsys):
    path = script("""
        import json, os, sys
        names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"]
        names += ["OMP_NUM_THREADS", "EXTRA"]
        print(json.dumps({name: os.environ[name] for name in names} | {"argv": sys.argv[1:]}))
    """)
    result = run(path, 3, 0.5, path, "two words", ranks=3, env=QUICK | {"EXTRA": "more"})
    expected = [
        {"rank": rank, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        | {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}
        | {"OMP_NUM_THREADS": "1", "EXTRA": "more", "argv": ["3", "0.5", str(path), "two words"]}
        for rank in range(3)
    ]
    assert result.rows == expected
    assert (result.ranks, result.failures) == (3, [])
    assert result.logs == path.with_suffix(".logs")
    assert capsys.readouterr().out == ""  # rows are for the caller alone


def test_rank_0_is_shown_and_all_is_logged(script, capsys):
    path = script("""
        import json, os, sys
        rank = os.environ["RANK"]
        print("hello from", rank)
        print(json.dumps([1, rank]))
        print("{", rank)
        print(json.dumps({"n": 1}))
        print(json.dumps({"n": 2}))
        print("an error from", rank, file=sys.stderr)
        print("the end of", rank, end="")
    """)
    result = run(path)
    assert result.rows == [{"rank": rank, "n": n} for rank in (0, 1) for n in (1, 2)]
    shown = capsys.readouterr()
    assert shown.out.splitlines() == ["hello from 0", '[1, "0"]', "{ 0", "the end of 0"]
    assert shown.err == ""
    for rank in "01":
        out = (result.logs / f"rank{rank}.out").read_text().splitlines()
        assert (out[0], out[-1]) == (f"hello from {rank}", f"the end of {rank}")
        assert (result.logs / f"rank{rank}.err").read_text() == f"an error from {rank}\n"


@gloo
@pytest.mark.integration
def test_ranks_meet_whatever_the_environment_says(script, monkeypatch):
    """Above all that of a notebook which was itself started by `torchrun`."""
    path = script(JOIN + '    print(json.dumps({"sum": total(rank + 1)}))')
    with socket.create_server(("127.0.0.1", 0)) as busy:
        monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
        monkeypatch.setenv("MASTER_PORT", str(busy.getsockname()[1]))
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.setenv(name, "7")
        assert run(path, ranks=3).rows == [{"rank": rank, "sum": 6.0} for rank in range(3)]


@gloo
@pytest.mark.integration
def test_two_launches_at_the_same_time_do_not_meet(script):
    paths = [
        script(JOIN + f'    print(json.dumps({{"sum": total({value})}}))', f"{value}.py")
        for value in (1, 10)
    ]
    with ThreadPoolExecutor() as pool:
        results = [*pool.map(run, paths)]
    assert [[row["sum"] for row in result.rows] for result in results] == [[2, 2], [20, 20]]


@pytest.mark.integration
def test_a_launch_needs_no_activated_environment(script, tmp_path):
    """Nor an installed sftlib: a notebook may have found it beside itself."""
    (tmp_path / "here").mkdir()
    shutil.copytree(ROOT / "sftlib", tmp_path / "copy" / "sftlib")
    path = script("""
        import json, shutil, sys, sftlib
        found = {"sftlib": sftlib.__file__, "python": shutil.which(sys.argv[1])}
        print(json.dumps(found | {"executable": sys.executable}))
    """)
    code = """if True:
        import json, sys
        sys.path.insert(0, sys.argv[1])
        from sftlib.scale.launch import launch
        name = sys.executable.rpartition("/")[2]
        rows = launch(sys.argv[2], name, env={"DS_ACCELERATOR": ""}, timeout=60).rows
        print(json.dumps(rows))
    """
    hidden = ("PATH", "PYTHONPATH", "VIRTUAL_ENV")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    child = python(
        code,
        tmp_path / "copy",
        path,
        env=env | {"PATH": "/usr/bin:/bin", "PYTHONPATH": ""},
        cwd=tmp_path / "here",
    )
    shown = child.communicate(timeout=60)[0]
    found = {"sftlib": str(tmp_path / "copy" / "sftlib" / "__init__.py")}
    found |= {"python": sys.executable, "executable": sys.executable}
    assert json.loads(shown) == [{"rank": rank} | found for rank in (0, 1)]


def test_a_script_runs_as_if_run_directly(script):
    script("VALUE = 42", "neighbour.py")
    path = script("""
        import json, sys
        import neighbour
        if __name__ == "__main__":
            found = {"argv": sys.argv, "file": __file__, "path": sys.path[0]}
            print(json.dumps(found | {"main": sys.modules["__main__"].__name__}))
            print(json.dumps({"neighbour": neighbour.VALUE}))
    """)
    direct = subprocess.run([sys.executable, path, "-x", "1"], capture_output=True, check=True)
    expected = [json.loads(row) for row in direct.stdout.splitlines()]
    assert run(path, "-x", 1, ranks=1).rows == [{"rank": 0} | row for row in expected]


@pytest.mark.integration
@pytest.mark.parametrize("end", ["", "sys.exit()", "raise RuntimeError('late')"])
def test_what_a_script_leaves_for_its_end_is_done(script, end):
    path = script(f"""
        import atexit, json, sys, threading, time
        def goodbye():
            print(json.dumps({{"goodbye": name}}), end="")
        def save():
            time.sleep(0.5)
            print(json.dumps({{"saved": name}}))
        name = "rank"
        atexit.register(goodbye)
        if "late" not in {end!r}:  # after an error, no thread is waited for
            threading.Thread(target=save).start()
        {end}
    """)
    result = run(path, ranks=1, check=False)
    assert result.rows[-1] == {"rank": 0, "goodbye": "rank"}
    assert result.rows[:-1] == ([] if "late" in end else [{"rank": 0, "saved": "rank"}])
    assert bool(result.failures) == ("late" in end)


@pytest.mark.parametrize("value", [None, "", "cuda"])
def test_deepspeed_is_left_alone_unless_it_runs_on_a_cpu(value):
    env = {name: text for name, text in os.environ.items() if name != "DS_ACCELERATOR"}
    env |= {"PYTHONPATH": str(ROOT)} | ({} if value is None else {"DS_ACCELERATOR": value})
    code = "import sys; from sftlib.patches import without_builds; without_builds(); "
    code += "print('deepspeed' in sys.modules)"
    assert python(code, env=env).communicate(timeout=60)[0] == "False\n"


@pytest.mark.integration
@pytest.mark.skipif(unavailable() != "", reason="needs DeepSpeed")
def test_deepspeed_builds_nothing_on_a_cpu(script):
    path = script("""
        import json
        import deepspeed.ops
        print(json.dumps({"builds": deepspeed.ops.__compatible_ops__}))
    """)
    assert run(path, ranks=1, env={"DS_ACCELERATOR": "cpu"}).rows == [{"rank": 0, "builds": {}}]


# Odd output


@pytest.mark.integration
def test_odd_bytes_and_line_ends_are_shown_once_and_whole(script, capsys):
    """A row is a line, whatever its text."""
    text = "one\u2028two\x0bthree\x85"
    path = script(rf"""
        import json, sys, time
        for n in range(4):
            row = json.dumps({{"n": n, "text": {text!r}}}, ensure_ascii=False).encode()
            sys.stdout.buffer.write(b"caf\xe9 \xff\xff\xff %d\r\nna\xc3" % n)
            sys.stdout.buffer.flush()
            time.sleep(0.2)  # so that it is read in parts, here in the middle of a character
            sys.stdout.buffer.write(b"\xafve %d\n" % n + row + b"\r\n")
            sys.stdout.buffer.flush()
        sys.stdout.buffer.write(b"the end \xc3")
    """)
    rows = run(path, ranks=1).rows
    assert rows == [{"rank": 0, "n": n, "text": text} for n in range(4)]
    shown = capsys.readouterr().out.splitlines()
    expected = [text for n in range(4) for text in (f"caf� ��� {n}", f"naïve {n}")]
    assert shown == [*expected, "the end �"]


def test_much_output_does_not_stall(script, capsys):
    path = script("""
        import os, sys
        for stream in (sys.stdout, sys.stderr):
            for n in range(20):
                stream.write(("x" * 99 + "\\n") * 1000)
            stream.write("last")
    """)
    started = time.monotonic()
    run(path)
    assert time.monotonic() - started < 20
    shown = capsys.readouterr().out
    assert len(shown) == 20 * 1000 * 100 + 5 and shown.endswith("x\nlast\n")


# Ranks that fail


@pytest.mark.integration
def test_a_failing_rank_says_why_and_where(script, capsys):
    path = script("""
        import json, os, time
        from pathlib import Path
        rank = int(os.environ["RANK"])
        print(json.dumps({"before": rank}))
        def fail():
            Path("none").read_text()  # here
        if rank == 0:
            time.sleep(2.5)
        if rank != 1:
            fail()
    """)
    expected = [
        f"rank {rank}: FileNotFoundError: [Errno 2] No such file or directory: 'none' "
        f"(work.py, line {line(path)})"
        for rank in (2, 0)  # the first to fail first
    ]
    result = run(path, ranks=3, check=False)
    assert result.failures == expected
    assert capsys.readouterr().out.splitlines() == expected
    assert result.rows == [{"rank": rank, "before": rank} for rank in range(3)]
    assert "Traceback" in (result.logs / "rank2.err").read_text()
    assert left(path.parent) == []


@gloo
@pytest.mark.integration
def test_ranks_that_lost_the_failing_one_come_last_and_in_short(script):
    path = script(
        JOIN
        + """
    total(1)
    if rank == 1:
        time.sleep(1)
        raise ValueError("bad batch")  # here
    total(2)
    """
    )
    first, *others = failures(path, ranks=3)
    assert first == f"rank 1: ValueError: bad batch (work.py, line {line(path)})"
    assert sorted(others) == [
        f"rank {rank}: {LOST} (work.py, line {line(path, '# meet')})" for rank in (0, 2)
    ]


@pytest.mark.integration
def test_a_failed_script_ends_with_the_code_that_python_itself_would_give(script, tmp_path):
    command = [
        sys.executable,
        "-m",
        "sftlib.scale.rank_process",
        str(script("raise ValueError('bad batch')")),
    ]
    notes = {"SFT_RANK_NOTES": str(tmp_path / "rank0")}
    assert subprocess.run(command, env=os.environ | notes, capture_output=True).returncode == 1


@pytest.mark.integration
def test_a_rank_that_only_followed_is_told_last_though_it_ended_first(script):
    path = script(
        """
    import os, time
    if os.environ["RANK"] == "0":
        raise RuntimeError("Connection closed by peer")
    time.sleep(1)
    raise ValueError("bad batch")
    """
    )
    first, second = failures(path, ranks=2)
    assert first.startswith("rank 1: ValueError: bad batch")
    assert second.startswith(f"rank 0: {LOST}")


@pytest.mark.integration
def test_ranks_that_still_wait_for_a_failed_one_are_stopped(script, monkeypatch):
    monkeypatch.setattr(launch_module, "GRACE", 0.5)
    path = script(
        SLEEP
        + """
    if os.environ["RANK"] == "1":
        sys.exit("no data")
    nap()
    """
    )
    started = time.monotonic()
    assert failures(path) == ["rank 1: ended with code 1. no data"]
    assert time.monotonic() - started < 10


def test_each_way_to_fail_is_told_in_a_line(script, monkeypatch):
    """One way per rank. The names of script and logs are relative, as in a notebook."""
    ways = {
        "print('because', file=sys.stderr); sys.exit(3)": "ended with code 3. because",
        "sys.stderr.write('much\\n' * 9 + 'last\\n \\n'); os._exit(4)": "ended with code 4. last",
        "os._exit(5)": "ended with code 5.",
        "os.kill(os.getpid(), 9)": "killed by SIGKILL, as when memory runs out",
        "os.kill(os.getpid(), 6)": "killed by SIGABRT",
        "raise ValueError()": "ValueError: (work.py, line 13)",
        "os.chdir('/'); 1 / 0": "ZeroDivisionError: division by zero (work.py, line 15)",
    }
    tests = [f"if os.environ['RANK'] == '{rank}':\n    {way}" for rank, way in enumerate(ways)]
    path = script("\n".join(["import os, sys", *tests]))
    monkeypatch.chdir(path.parent)
    result = run(path.name, ranks=len(ways) + 1, check=False)
    expected = [f"rank {rank}: {way}" for rank, way in enumerate(ways.values())]
    assert sorted(result.failures) == expected


def test_a_syntax_error_is_told_with_its_line(script, capsys):
    path = script("import os\n\nif True:\nprint(1)\n")
    for rank, text in enumerate(sorted(failures(path))):
        assert text.startswith(f"rank {rank}: IndentationError: expected an indented block")
        assert "(work.py, line 4)" in text
    assert capsys.readouterr().out == ""  # the error has said it


def test_a_long_error_becomes_one_short_line(script):
    path = script("raise ValueError('first\\n\\n  second ' + 'word ' * 2000)")
    (text,) = failures(path, ranks=1)
    assert text.startswith("rank 0: ValueError: first second word word")
    assert text.endswith("… (work.py, line 1)") and 200 < len(text) < 340


# Ranks that hang


@pytest.mark.integration
def test_a_hang_is_located(script, tmp_path):
    """Also where names are not ASCII, which is written in another way there."""
    (tmp_path / "naïve — folder").mkdir()
    path = script(
        SLEEP
        + """
    import threading
    print('{"begun": true}')
    rank = int(os.environ["RANK"])
    if rank == 0:
        nap()
    if rank == 1:
        threading.Thread(target=nap, daemon=True).start()
        threading.Event().wait()  # wait
    """,
        name="naïve — folder/work.py",
    )
    found = failures(path, ranks=3, timeout=3)
    assert found[0] == "not ready after 3 seconds"
    assert found[1].startswith(f"rank 0: is in nap (work.py, line {line(path)})")
    inside = r"rank 1: is in wait \(threading\.py, line \d+\)"
    assert re.fullmatch(f"{inside}, called from work.py, line {line(path, '# wait')}", found[2])
    assert found[3:] == ["rank 2: has ended"]


@gloo
@pytest.mark.integration
def test_a_hang_in_a_collective_is_located(script):
    path = script(JOIN + "    total(1) if rank == 0 else time.sleep(99)  # here")
    found = failures(path, timeout=12)
    inside = r"rank 0: is in all_reduce \(distributed_c10d\.py, line \d+\)"
    assert re.fullmatch(f"{inside}, called from work.py, line {line(path, '# meet')}", found[1])
    assert found[2].startswith(f"rank 1: is in <module> (work.py, line {line(path)})")


@pytest.mark.integration
def test_nothing_is_left_after_the_time_is_up(script):
    path = script(STUBBORN)
    assert len(failures(path, timeout=3)) == 3
    assert (path.parent / "ready0").exists() and (path.parent / "ready1").exists()


def test_nothing_is_left_after_a_good_run(script):
    path = script(PARENT.replace("    nap()\n", ""))
    assert run(path).failures == []
    assert left(path.parent) == []


@pytest.mark.integration
def test_an_interrupt_stops_all(launcher, tmp_path):
    """With SIGTERM first, so that a script can save what it has."""
    process = launcher(SAVES)
    assert len(running(tmp_path)) == 5
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[0].splitlines()[-1] == "interrupted"
    assert left(tmp_path) == []
    for rank in range(2):
        assert (tmp_path / "work.logs" / f"rank{rank}.out").read_text() == "ready\nsaved\n"


@pytest.mark.integration
def test_a_second_interrupt_stops_all_at_once(launcher, tmp_path):
    process = launcher(STUBBORN)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)  # it now waits for ranks that ignore SIGTERM
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[0].splitlines()[-1] == "interrupted"
    assert left(tmp_path) == []


@pytest.mark.integration
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ranks_and_their_children_end_with_the_launcher(launcher, tmp_path, number):
    process = launcher(STUBBORN)
    assert len(running(tmp_path)) == 5
    process.send_signal(number)
    process.wait()
    assert left(tmp_path, seconds=10) == []


# Logs, locks, stored runs


@pytest.mark.integration
def test_the_logs_of_a_living_launch_are_left_alone(launcher, tmp_path):
    process = launcher(SLEEP + READY)
    begun = (tmp_path / "work.logs" / "rank0.out").read_text()
    with pytest.raises(RuntimeError, match=f"Process {process.pid} .*{tmp_path}/work.logs"):
        run(tmp_path / "work.py")
    assert (tmp_path / "work.logs" / "rank0.out").read_text() == begun == "ready\n"
    (tmp_path / "work.py").write_text("print('other logs')")
    assert run(tmp_path / "work.py", logs=tmp_path / "deep" / "er").failures == []
    assert (tmp_path / "deep" / "er" / "rank1.out").read_text() == "other logs\n"


def test_who_has_the_logs_is_said_even_where_its_number_is_still_to_be_written(script):
    path = script("print(1)")
    logs = path.with_suffix(".logs")
    logs.mkdir()
    (logs / "rank0.out").write_text("its output")
    with (logs / "launcher.pid").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        threading.Timer(0.2, (logs / "launcher.pid").write_text, ["4321"]).start()
        with pytest.raises(RuntimeError, match="Process 4321 is running.*or name another folder"):
            run(path, ranks=1)
    assert (logs / "rank0.out").read_text() == "its output"
    assert run(path, ranks=1).failures == []


@pytest.mark.integration
def test_of_two_launches_at_once_one_gets_the_logs(script):
    path = script("import time; time.sleep(1)")

    def one(_):
        try:
            return run(path, ranks=1).failures
        except RuntimeError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        ends = list(pool.map(one, range(2)))
    assert [] in ends
    assert any(str(end).startswith(f"Process {os.getpid()} is running") for end in ends)


@pytest.mark.parametrize("text", ["alive", "", "rubbish"])
def test_a_launch_that_is_gone_is_no_obstacle(script, text):
    """Nor where another process has its number by now."""
    path = script("print(1)")
    path.with_suffix(".logs").mkdir()
    mark = path.with_suffix(".logs") / "launcher.pid"
    mark.write_text(str(os.getppid()) if text == "alive" else text)
    assert run(path, ranks=1).failures == []
    assert mark.read_text() == str(os.getpid())


def test_what_a_rank_leaves_behind_does_not_keep_its_logs(script, tmp_path):
    path = script("""
        import subprocess, sys
        nap = [sys.executable, "-c", "import time; time.sleep(30)"]
        print('{"pid": %d}' % subprocess.Popen(nap, start_new_session=True, close_fds=False).pid)
    """)
    left_behind = [run(path, ranks=1).rows[0]["pid"] for _ in range(2)]
    for pid in left_behind:
        os.kill(pid, signal.SIGKILL)


def test_logs_of_an_earlier_launch_are_replaced(script):
    path = script("import sys; print('first'); sys.exit(int(sys.argv[1]))")
    assert len(run(path, 1, ranks=3, check=False).failures) == 3
    path.write_text("raise ValueError('again')")
    lines = sorted(text[:25] for text in failures(path, ranks=3))  # they fail in any order
    assert lines == [f"rank {rank}: ValueError: again" for rank in range(3)]
    path.write_text("print('second')")
    result = run(path, ranks=1)
    assert result.failures == []
    there = {file.name for file in result.logs.iterdir()}
    assert there <= {"launcher.pid", *(f"rank0.{kind}" for kind in KINDS)}
    assert (result.logs / "rank0.out").read_text() == "second\n"


def test_what_else_is_in_the_folder_of_the_logs_stays(script, tmp_path):
    path = script("print('again')")
    notes = tmp_path / "ranks.md"
    notes.write_text("mine")
    for _ in range(2):
        assert run(path, ranks=1, logs=tmp_path).failures == []
    assert notes.read_text() == "mine" and path.exists()


def test_old_locks_of_builds_are_told_and_stay(script, monkeypatch, tmp_path, capsys):
    locks = [tmp_path / "builds" / name / "lock" for name in ("old", "py311_cpu/old", "fresh")]
    for lock in locks:
        lock.parent.mkdir(parents=True)
        lock.touch()
    minutes = {locks[0]: 11, locks[1]: 60 * 24, locks[2]: 9}
    for lock, age in minutes.items():
        os.utime(lock, (time.time(), time.time() - age * 60))
    assert set(old_builds()) == set(locks[:2])
    run(script("print('begun')"), ranks=1)
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == "begun" and len(shown) == 3
    for lock in locks[:2]:
        assert sum(text.startswith(f"{lock} ") for text in shown) == 1
    assert all(lock.exists() for lock in locks)
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".cache").mkdir()
    (tmp_path / "builds").rename(tmp_path / ".cache" / "torch_extensions")
    assert len(old_builds()) == 2


def test_a_stored_run_takes_the_place_of_one_that_cannot_run(script, monkeypatch, tmp_path, capsys):
    stored = script('{"rank": 0, "n": 1}\n{"rank": 1, "n": 2}\n', "rows.jsonl")
    monkeypatch.setenv("SFT_DEEPSPEED", "stored")
    result = run(tmp_path / "none.py", stored=stored, ranks=2)
    assert result.rows == [{"rank": 0, "n": 1}, {"rank": 1, "n": 2}]
    assert (result.ranks, result.failures, result.logs) == (2, [], None)
    assert capsys.readouterr().out == "A stored run, since SFT_DEEPSPEED=stored asks for it.\n"
    path = script("print('live')")
    assert run(path).logs
    assert capsys.readouterr().out == "live\n"


@pytest.mark.skipif(unavailable() != "", reason="needs DeepSpeed")
def test_where_deepspeed_can_run_it_does(script, capsys):
    result = run(script("print('live')"), stored=script('{"rank": 0}\n', "rows.jsonl"))
    assert (result.logs.is_dir(), result.rows) == (True, [])
    assert capsys.readouterr().out == "live\n"


def test_what_keeps_deepspeed_from_running_is_named(script, monkeypatch, capsys):
    stored = script('{"rank": 0}\n', "rows.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        assert "this is darwin" in unavailable()
        assert run("none.py", stored=stored).rows == [{"rank": 0}]
        assert "this is darwin" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "linux")
        find = importlib.util.find_spec
        patch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest: None if name == "deepspeed" else find(name, *rest),
        )
        assert unavailable() == "DeepSpeed is not installed"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"script": "none.py"}, FileNotFoundError, "found no file .*none.py"),
        ({"script": "."}, FileNotFoundError, "Write it first"),
        ({"ranks": 0}, ValueError, "found ranks=0, timeout=60"),
        ({"ranks": -2}, ValueError, "ranks=-2"),
        ({"timeout": 0}, ValueError, "timeout=0"),
        ({"timeout": -1}, ValueError, "timeout=-1"),
    ],
)
def test_bad_input_is_told_before_anything_starts(script, tmp_path, options, error, message):
    path = script("print(1)")
    with pytest.raises(error, match=message):
        run(tmp_path / options.pop("script", path), **options)
    assert [*tmp_path.iterdir()] == [path]
