"""What the README promises is so: its commands run, and what it names is there."""

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import readme_table

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text()


def commands() -> list[str]:
    """The lines of the README's first block of code, without their comments."""
    block = re.search(r"```sh\n(.*?)```", README, re.DOTALL)[1]
    return [line.split("#")[0].strip() for line in block.splitlines()]


def targets() -> set[str]:
    """What the Makefile can make."""
    return set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))


# --- The text ------------------------------------------------------------------------------------


def test_the_two_commands_and_the_lessons_stand_on_the_first_screen():
    assert commands() == ["make lab", "make test"]
    assert README.index(readme_table.BEGIN) < 900


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci/run").read_text().splitlines()
    assert commands()[1] in script and "set -euo pipefail" in script
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert f"run: {commands()[1]}\n" in (ROOT / ".github/workflows/test.yml").read_text()


def test_the_lesson_table_is_current():
    current = readme_table.updated(README, readme_table.table())
    assert current == README, "The table is not current. Run: make format"


@pytest.mark.parametrize("block", [readme_table.pages, readme_table.sections])
def test_the_instructors_list_and_table_are_current(block):
    page = (ROOT / "instructor/README.md").read_text(encoding="utf-8")
    current = readme_table.updated(page, block())
    assert current == page, "The list or table is not current. Run: make format"


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_every_make_target_named_exists(text: str):
    named = set(re.findall(r"`(?:\w+=\S+ )?make ([a-z-]+)", text)) | {
        line.split()[1] for line in commands()
    }
    assert named and named <= targets()


def test_every_make_target_is_explained():
    explained = set(re.findall(r"^([a-z-]+):.*## \S", MAKEFILE, re.MULTILINE))
    assert explained == targets()


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_every_link_leads_to_a_file(text: str):
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_the_file_tree_names_what_there_is():
    tree = re.search(r"## What is where\n\n```\n(.*?)```", README, re.DOTALL)[1]
    named = re.findall(r"^(\S+)", tree, re.MULTILINE) + re.findall(r"(?<!\S)([.\w]+/\w+/)", tree)
    assert len(named) > 10 and not [name for name in named if not (ROOT / name).exists()]


def test_every_folder_is_in_the_file_tree():
    listed = ["git", "ls-files"]
    tracked = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {line.split("/")[0] + "/" for line in tracked.splitlines() if "/" in line}
    tree = README[README.index("## What is where") :]
    assert not [folder for folder in folders if f"\n{folder}" not in tree]


def test_every_setting_is_explained():
    example = (ROOT / ".env.example").read_text()
    settings = re.findall(r"^# ([A-Z_]+)=", example, re.MULTILINE)
    assert set(settings) == {
        *("SFT_TEACHER", "OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_MODEL"),
        *("SFT_MODEL", "SFT_DEEPSPEED", "HF_TOKEN"),
    }
    assert not [name for name in settings if name not in README]


def test_the_messages_in_the_table_are_those_of_the_tools():
    table = README[README.index("| message |") :].split("\n\n")[0].splitlines()[2:]
    code = "".join((ROOT / "tools" / name).read_text() for name in ("environment.py", "lab.py"))
    code = re.sub(r'"\s+f?"', "", code).replace("{dotted(OLDEST)}", "3.11")
    code = code.replace("{dotted(NEWEST)}", "3.14").replace("{needed_gb:.0f}", "4")
    code = code.replace("{text} {why}", "8888 is used by another program")
    messages = [row.split("|")[1].strip() for row in table][:-1]
    assert len(messages) == 6 and not [m for m in messages if m not in code]


# --- The lesson table ----------------------------------------------------------------------------


@pytest.fixture
def course(tmp_path: Path) -> Path:
    """A folder with one lesson of which only the first cell matters."""
    (tmp_path / "notebooks").mkdir()
    first = '{"cells": [{"source": ["# Lesson 1: Sums\\n", "\\n", "> You will have added."]}]}'
    (tmp_path / "notebooks/01_sums.ipynb").write_text(first)
    return tmp_path


def test_the_table_names_title_promise_and_measured_minutes(course: Path):
    link = "[Sums](notebooks/01_sums.ipynb)"
    row = f"| 1 | {link} | You will have added. |"
    assert f"{row} not measured |  |  |" in readme_table.table(course)
    (course / "data").mkdir()
    lessons = {"01_sums": {"sections": {"Set-up": 3.2}, "slowest": {"cell": "a", "seconds": 7.4}}}
    measured = {"machine": "two busy cores", "seconds": {"01_sums": 90}, "lessons": lessons}
    (course / "data/benchmarks.json").write_text(json.dumps(measured))
    (course / "instructor").mkdir()
    (course / "instructor/01_sums.md").write_text("a plan\n\n**In all: 104 minutes**; short")
    assert f"{row} 1.5 |  | 104 |" in readme_table.table(course)
    assert "two busy cores; 2 in all" in readme_table.table(course)
    assert "| 1 | Set-up | 3 |" in readme_table.sections(course)
    assert "\n1. [Sums](01_sums.md)\n" in readme_table.pages(course)


@pytest.mark.parametrize(
    ("takes", "minutes"),
    [
        ("about two minutes of computing, and 50 minutes of reading and thinking.", "50"),
        ("a minute of computing. Reading and predicting take about 100 minutes.", "100"),
        ("a minute of computing, no GPU; an hour of reading and planning.", "60"),
        ("a minute of computing; half an hour of reading.", "30"),
        ("a minute of computing; three quarters of an hour of reading.", "45"),
        ("ten minutes of computing.", ""),
    ],
)
def test_minutes_of_reading_are_those_that_the_lesson_names(tmp_path: Path, takes, minutes):
    first = {"cells": [{"source": [f"# Lesson 1: Sums\n\n**Takes** {takes}"]}]}
    (tmp_path / "01_sums.ipynb").write_text(json.dumps(first))
    assert readme_table.reading(tmp_path / "01_sums.ipynb") == minutes


def test_the_table_replaces_only_what_lies_between_its_marks(course: Path):
    old = f"before\n{readme_table.BEGIN}\nstale\n{readme_table.END}\nafter\n"
    block = readme_table.table(course)
    new = readme_table.updated(old, block)
    assert new == f"before\n{block}\nafter\n" and "stale" not in new
    with pytest.raises(ValueError, match="must hold the marks"):
        readme_table.updated("no marks", block)


def test_a_lesson_without_a_promise_is_an_error(course: Path):
    (course / "notebooks/02_more.ipynb").write_text('{"cells": [{"source": ["# More"]}]}')
    with pytest.raises(ValueError, match="02_more.ipynb: the first cell must hold"):
        readme_table.table(course)


# --- `make lab`, as written ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen, int, str]]:
    """`make lab` on a free port, as from a shell: the process, its port and its token."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("lab") / "log"
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    with log.open("w") as out:
        process = subprocess.Popen(
            commands()[0].split(),
            cwd=ROOT,
            env=env | {"PORT": str(port), "BROWSER": "true"},  # the command `true`: no window
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # in a shell's background it would be ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        yield process, port, wait_for_token(process, log)
    finally:
        stop(process)


def wait_for_token(process: subprocess.Popen, log: Path) -> str:
    """The token in the address that JupyterLab prints."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if token := re.search(r"/lab/tree/notebooks\?token=([0-9a-f]{32,})", log.read_text()):
            return token[1]
        time.sleep(0.2)
    raise AssertionError(f"make lab printed no address with a token:\n{log.read_text()[-2000:]}")


def stop(process: subprocess.Popen) -> int:
    """What Ctrl-C does: interrupt the whole group; the exit status."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    try:
        return process.wait(20)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def status(port: int, path: str, host: str = "127.0.0.1") -> int:
    """The status code of an answer; 0 where nobody answers."""
    try:
        return urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=60).status
    except urllib.error.HTTPError as problem:
        return problem.code
    except OSError:
        return 0


def own_address() -> str | None:
    """An address of this machine other than 127.0.0.1, found without sending anything."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        return probe.getsockname()[0]


@pytest.mark.integration
def test_make_lab_answers_with_its_token_only(server):
    _, port, token = server
    assert status(port, f"/api/status?token={token}") == 200
    assert status(port, f"/lab?token={token}") == 200
    assert status(port, "/api/status") == 403
    assert status(port, f"/api/status?token={'0' * len(token)}") == 403


@pytest.mark.integration
def test_make_lab_shows_the_lessons(server):
    _, port, token = server
    names = {item["name"] for item in ask(port, "contents/notebooks", token)["content"]}
    assert names >= {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}


@pytest.mark.integration
def test_make_lab_listens_on_this_machine_alone(server):
    _, port, token = server
    if (address := own_address()) is None:
        pytest.skip("this machine has no other address")
    assert status(port, f"/api/status?token={token}", address) == 0


@pytest.mark.integration
def test_a_second_make_lab_on_the_port_says_so_and_fails(server):
    _, port, _ = server
    call = ["make", "lab", f"PORT={port}"]
    second = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert second.returncode != 0 and "Traceback" not in second.stderr
    assert f"Port {port} is used by another program" in second.stderr


@pytest.mark.integration
def test_the_kernel_is_the_environments_and_ends_with_ctrl_c(server):
    process, port, token = server
    kernel = ask(port, "kernels", token, data=b"{}")
    assert kernel["name"] == "python3"
    assert [row for row in processes() if kernel["id"] in row and f"{ROOT}/.venv/bin/" in row]

    stop(process)
    assert status(port, "/api/status") == 0
    ours = (kernel["id"], f"--port={port}")
    deadline = time.monotonic() + 60  # a kernel that has just started needs a moment to end
    while left := [row for row in processes() if any(name in row for name in ours)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def ask(port: int, what: str, token: str, data: bytes | None = None) -> dict:
    """JupyterLab's answer to a request that carries the token."""
    head = {"Authorization": f"token {token}"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/api/{what}", data, head)
    return json.load(urllib.request.urlopen(request, timeout=120))


def processes() -> list[str]:
    """The command lines of all processes."""
    listed = subprocess.run(["ps", "-A", "-ww", "-o", "args="], capture_output=True, text=True)
    return listed.stdout.splitlines()
