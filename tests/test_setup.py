"""The set-up makes `.venv`, repairs it, leaves it alone, and says clearly why it cannot."""

import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest

from tools import environment, lab

ROOT = environment.ROOT
HERE = environment.dotted(sys.version_info[:2])


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A course in small: the set-up of this repository, and nothing to install."""
    (tmp_path / "tools").mkdir()
    for name in ("Makefile", "tools/environment.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in environment.INPUTS:
        (tmp_path / name).write_text("")
    return tmp_path


@pytest.fixture
def finished(project: Path) -> Path:
    """The same with a stamped `.venv`, whose Python is a stub that answers the probe."""
    stub(project / ".venv/bin/python", f"echo {HERE}")
    environment.write_stamp(project)
    return project


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands are recorded instead of run."""
    recorded: list[list[str]] = []

    def run(command: list[str], root: Path, lock: object) -> None:
        (root / ".venv").mkdir(exist_ok=True)
        recorded.append(command)

    monkeypatch.setattr(environment, "run", run)
    return recorded


def stub(path: Path, script: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def make(project: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """`make setup` in a copy, as a person would call it."""
    return subprocess.run(["make", "setup"], cwd=project, env=outside(**settings), **CAPTURED)


def outside(**settings: str) -> dict[str, str]:
    """The environment variables of a shell that no `make` and no pytest has touched."""
    ours = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON", "PYTEST_CURRENT_TEST"}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    # The Python of these tests makes the environment, whichever `python3` is.
    return {**kept, "PYTHON": getattr(sys, "_base_executable", sys.executable), **settings}


CAPTURED = {"capture_output": True, "text": True, "timeout": 180, "stdin": subprocess.DEVNULL}


# --- What the machine must have ------------------------------------------------------------------


@pytest.mark.parametrize("version", [(3, 11, 0), (3, 12, 4), (3, 13, 9), (3, 14, 0), (3, 14, 2)])
def test_supported_python_is_accepted(version):
    environment.check_python(version)


@pytest.mark.integration
@pytest.mark.parametrize("version", [(2, 7, 18), (3, 8, 0), (3, 10, 14), (3, 14, 1), (3, 15, 0)])
def test_other_python_is_refused_with_what_was_found(version):
    with pytest.raises(environment.SetupError, match="needs Python 3.11 to 3.14") as problem:
        environment.check_python(version)
    assert f"this is Python {environment.dotted(version)}" in str(problem.value)


def test_a_supported_python_is_named_where_there_is_one(tmp_path: Path, monkeypatch):
    stub(tmp_path / "python3.13", "exit 1")  # like a pyenv shim that leads nowhere
    stub(tmp_path / "python3.12", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(environment.SetupError, match="make setup PYTHON=python3.12"):
        environment.check_python((3, 9, 6))


def test_without_a_supported_python_the_advice_is_to_install_one(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(environment.SetupError, match="Install one"):
        environment.check_python((3, 9, 6))


def test_missing_ensurepip_names_the_package(tmp_path: Path):
    python = stub(tmp_path / "python3", 'case "$2" in *ensurepip*) exit 1;; esac')
    with pytest.raises(environment.SetupError, match="apt install python3-venv"):
        environment.check_venv_module(str(python))
    environment.check_venv_module(sys.executable)


def test_a_full_disk_is_refused_with_both_numbers(tmp_path: Path, monkeypatch):
    usage = shutil._ntuple_diskusage
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(9e9, 8e9, 1.25e9))
    with pytest.raises(environment.SetupError, match=r"about 4 GB, .* 1\.2 GB free"):
        environment.check_disk(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(9e9, 1e9, 4.1e9))
    environment.check_disk(tmp_path)


def test_pyproject_and_ci_name_the_same_pythons():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11,<3.15,!=3.14.1"
    workflow = (ROOT / ".github/workflows/test.yml").read_text()
    ends = [environment.dotted(v) for v in (environment.OLDEST, environment.NEWEST)]
    assert ends == ["3.11", "3.14"] and f"python: {json.dumps(ends)}" in workflow


# --- What state the environment is in ------------------------------------------------------------


def test_no_environment_is_made(project: Path):
    assert environment.plan(project) == environment.Plan("make", "there is none yet")


def test_a_finished_environment_is_kept(finished: Path):
    assert environment.plan(finished) == environment.Plan("keep")
    assert environment.plan(finished, wanted=HERE) == environment.Plan("keep")


@pytest.mark.parametrize("name", environment.INPUTS)
def test_changed_requirements_are_installed(finished: Path, name: str):
    (finished / name).write_text("# changed\n")
    assert environment.plan(finished) == environment.Plan("install", f"{name} changed")


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"root": "x"}'])
def test_without_a_whole_stamp_it_is_made_again(finished: Path, content: str | None):
    stamp = finished / ".venv/sft-stamp.json"
    stamp.unlink() if content is None else stamp.write_text(content)
    assert "did not finish" in environment.plan(finished).reason


@pytest.mark.parametrize("target", ["nowhere", None])
def test_a_broken_python_is_noticed(finished: Path, target: str | None):
    (finished / ".venv/bin/python").unlink()
    if target:
        (finished / ".venv/bin/python").symlink_to(target)
    assert environment.plan(finished).action == "make"


def test_a_missing_pip_is_noticed(finished: Path):
    stub(finished / ".venv/bin/python", "exit 1")  # what `import pip` ends with
    assert "its pip is missing" in environment.plan(finished).reason


def test_another_python_is_noticed(finished: Path):
    stub(finished / ".venv/bin/python", "echo 3.99")
    assert environment.plan(finished).action == "make"


def test_another_python_asked_for_is_made(finished: Path):
    assert "3.99 was asked for" in environment.plan(finished, wanted="3.99").reason


def test_a_moved_environment_is_noticed(finished: Path):
    moved = finished.with_name("moved")
    finished.rename(moved)
    assert "moved or copied" in environment.plan(moved).reason


# --- What is done about it -----------------------------------------------------------------------


def test_nothing_is_run_where_nothing_changed(finished: Path, steps: list):
    started = time.process_time()
    assert environment.ensure(finished).action == "keep"
    assert steps == [] and time.process_time() - started < 0.3


def test_the_stamp_is_written_last(project: Path, steps: list, monkeypatch):
    monkeypatch.setattr(environment, "write_stamp", lambda root: steps.append(["stamp"]))
    environment.ensure(project)
    assert [step[-1] for step in steps][1:] == ["pip", "--requirement=requirements.txt", "stamp"]
    assert steps[0][1:3] == ["-m", "venv"]


def test_changed_requirements_call_pip_but_keep_the_environment(finished: Path, steps: list):
    (finished / "requirements.txt").write_text("# changed\n")
    assert environment.ensure(finished).action == "install"
    assert len(steps) == 2 and environment.plan(finished).action == "keep"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, environment.SetupError])
@pytest.mark.parametrize(
    ("said", "action"), [("Installing collected packages", "make"), ("Collecting", "install")]
)
def test_an_interrupted_update_is_noticed_and_one_that_changed_nothing_goes_on(
    finished: Path, monkeypatch, stop: type, said: str, action: str
):
    def interrupted(*_: object) -> None:
        (finished / ".venv/setup.log").write_text(f"{said}: trl\n")
        raise stop

    (finished / "requirements.txt").write_text("# changed\n")
    with monkeypatch.context() as broken, pytest.raises(stop):
        broken.setattr(environment, "run", interrupted)
        environment.ensure(finished)
    todo = environment.plan(finished)
    assert todo.action == action
    assert ("did not finish" in todo.reason) == (action == "make")


def test_progress_says_how_far_pip_is(project: Path):
    (project / "constraints.txt").write_text("# pins\na==1\nb==2\nc==3\n")
    log = (
        "Collecting a==1\n  Downloading a-1.whl (9 kB)\nProgress 0 of 9000\nProgress 4500 of 9000\n"
    )
    assert environment.progress(log, project) == "fetching, 1 of about 3 packages, a 50 %"
    (project / ".venv/lib/python3.11/site-packages/a-1.dist-info").mkdir(parents=True)
    done = environment.progress(log + "Installing collected packages: a, b, c\n", project)
    assert done == "installing, 1 of about 3 packages"


@pytest.mark.parametrize(
    "line, todo",
    [
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("NewConnectionError: Temporary failure in name resolution", "index could not be reached"),
        ("ConnectTimeoutError", "index could not be reached"),
        ("ERROR: ResolutionImpossible: for help visit", "Correct what these lines say"),
    ],
)
def test_advice_shows_the_end_of_the_log_and_what_to_do(line: str, todo: str):
    text = environment.advice("\n".join([*(f"Collecting {i}" for i in range(50)), line]))
    assert line in text and todo in text and "Collecting 10" not in text


# --- The whole thing, with a real Python and a real pip ------------------------------------------


@pytest.mark.nightly
def test_make_setup_makes_repairs_and_then_does_nothing(project: Path):
    first = make(project)
    assert first.returncode == 0, first.stderr
    assert "Making .venv" in first.stdout and "ready" in first.stdout
    assert make(project).stdout == ".venv is up to date.\n"

    python = project / ".venv/bin/python"
    python.unlink()
    python.symlink_to("nowhere")
    repaired = make(project)
    assert repaired.returncode == 0 and "its Python or its pip is missing" in repaired.stdout
    assert make(project).stdout == ".venv is up to date.\n"


@pytest.mark.nightly
def test_two_at_once_wait_for_each_other(project: Path):
    call = [outside()["PYTHON"], "tools/environment.py"]
    both = [
        subprocess.Popen(call, cwd=project, env=outside(), stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    texts = [process.communicate(timeout=180)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("Making .venv" in text for text in texts) == 1
    assert sum("waiting until it has finished" in text for text in texts) == 1


@pytest.mark.nightly
def test_without_network_it_says_so_and_leaves_no_stamp(project: Path):
    (project / "requirements.txt").write_text("a-package-that-is-nowhere==1\n")
    dead = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1"}
    dead |= {"PIP_EXTRA_INDEX_URL": dead["PIP_INDEX_URL"], "PIP_CONFIG_FILE": os.devnull}
    failed = make(project, **dead)
    assert failed.returncode != 0 and "Traceback" not in failed.stderr
    assert "The package index could not be reached" in failed.stderr
    assert environment.read_stamp(project) is None


def test_an_old_python_gets_a_sentence_and_no_traceback(project: Path):
    old = stub(project / "python", f'exec "{sys.executable}" -c "$PRETEND" "$@"')
    pretend = (
        "import runpy, sys; sys.version_info = (3, 9, 6); sys.argv[:] = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    refused = make(project, PYTHON=str(old), PRETEND=pretend)
    assert refused.returncode != 0 and "Traceback" not in refused.stderr
    assert "needs Python 3.11 to 3.14" in refused.stderr and not (project / ".venv").exists()


# --- The pins ------------------------------------------------------------------------------------


def pins(name: str) -> dict[str, str]:
    """Package and version of every line of a requirements file; a line without one fails."""
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    rows = [line for line in lines if line and not line.startswith("-")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", row) for row in rows), rows
    return {normal(row.split("==")[0]): row.split("==")[1] for row in rows}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_direct_dependencies_agree_with_the_constraints():
    assert (ROOT / "requirements.txt").read_text().startswith("-c constraints.txt\n-e .\n")
    assert pins("requirements.txt").items() <= pins("constraints.txt").items()


def test_no_pin_fits_one_kind_of_machine_only():
    names = pins("constraints.txt")
    assert not [n for n in names if n.startswith("nvidia") or n == "triton"]
    assert not [v for v in names.values() if "+" in v]


def test_every_installed_package_is_pinned():
    machine = re.compile(r"nvidia-.*|triton|cuda-.*|sftlib")
    installed = {normal(d.name): d.version.split("+")[0] for d in distributions(path=site())}
    ours = {n: v for n, v in installed.items() if not machine.fullmatch(n)}
    known = pins("constraints.txt")
    for path in ROOT.glob("requirements-*.txt"):
        known |= pins(path.name)
    assert ours.items() <= known.items()


def site() -> list[str]:
    return [path for path in sys.path if path.endswith("site-packages")]


def test_no_file_names_the_host_of_a_package_registry():
    hosts = ["py" + "pi.org", "python" + "hosted.org", "download.py" + "torch.org"]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, **CAPTURED).stdout
    tracked = listed.splitlines()
    small = [p for p in tracked if (ROOT / p).is_file() and (ROOT / p).stat().st_size < 3e6]
    named = [p for p in small for h in hosts if h.encode() in (ROOT / p).read_bytes()]
    assert not named


# --- JupyterLab's port and options ---------------------------------------------------------------


def test_a_taken_port_is_a_clear_message():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(SystemExit, match=f"Port {port} is used by another program"):
            lab.check_port(str(port))
    assert lab.check_port(str(port)) == port


@pytest.mark.parametrize("text", ["", "abc", "0", "70000", "-1", "8888 "])
def test_a_port_that_is_none_is_a_clear_message(text: str):
    with pytest.raises(SystemExit, match="PORT must be a number"):
        lab.check_port(text)


def test_jupyterlab_stays_on_this_machine_and_keeps_its_token():
    call = " ".join(lab.command(8888, root=True, display=True))
    assert "--ip=127.0.0.1" in call and "--ServerApp.port_retries=0" in call
    assert "token" not in call and "password" not in call and "--no-browser" not in call


@pytest.mark.integration
def test_jupyterlab_asks_nobody_for_news_or_for_its_latest_version():
    from jupyterlab.handlers.announcements import NeverCheckForUpdate
    from jupyterlab.labapp import LabApp

    started = LabApp()
    assert started.news_url and started.check_for_updates_class is not NeverCheckForUpdate
    started.parse_command_line(lab.command(1, root=False, display=True)[3:])
    assert started.news_url is None and started.check_for_updates_class is NeverCheckForUpdate


def test_root_and_a_missing_display_change_the_call_only_where_they_apply():
    assert "--allow-root" in lab.command(1, root=True, display=True)
    assert "--allow-root" not in lab.command(1, root=False, display=True)
    assert "--no-browser" in lab.command(1, root=False, display=False)
    assert lab.has_display({}, "darwin") and lab.has_display({"DISPLAY": ":0"}, "linux")
    assert not lab.has_display({"DISPLAY": ""}, "linux")
