"""Every notebook obeys the rules, and every rule notices a notebook that does not."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from sftlib import models
from sftlib.scale import launch

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests import notebook_rules as rules
from tools import copies, notebooks

NOTEBOOKS = notebooks.find()
PNG = "iVBORw0KGgo="
SET_UP = 'x = 1 + 1\nprint(x)\nassert x == 2\nwork = lesson.begin("01_sums")'
TAKES = "*Difficulty ★☆☆ · importance ★★★ · 3 minutes*"


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.parent.name + "/" + path.name)
def test_notebook_obeys(path: Path, rule: rules.Rule):
    nb = nbformat.reads(path.read_text(encoding="utf-8"), nbformat.NO_CONVERT)
    assert not rule(nb, path), "\n".join(rule(nb, path))


@pytest.mark.nightly
def test_lesson_5_shows_stored_runs_where_deepspeed_cannot_run(tmp_path: Path):
    lesson = copies.course(tmp_path, "notebooks") / "notebooks" / "05_deepspeed.ipynb"
    command = [*notebooks.NBCONVERT, "--inplace", str(lesson)]
    stored = os.environ | {"SFT_DEEPSPEED": "stored"}
    stored.pop("PYTEST_CURRENT_TEST", None)
    subprocess.run(command, env=stored, check=True, capture_output=True)
    nb = nbformat.read(lesson, 4)
    said = [rules.readable(output) for _, _, output in rules.outputs(nb)]
    launches = sum(cell.source.count("stored=") for _, cell in rules.code_cells(nb))
    assert launches == 5 == sum("A stored run, since SFT_DEEPSPEED" in text for text in said)


# --- The rules can fail --------------------------------------------------------------------------


def good() -> NotebookNode:
    """A small notebook with nothing to complain about."""
    printed = new_output("stream", name="stdout", text="2\n")
    picture = new_output("display_data", data={"image/png": PNG, "text/plain": "<Figure size 1x1>"})
    return new_notebook(
        cells=[
            new_markdown_cell("# Lesson 1: Sums\n> You will have added.\n\nSee [below](#The-end)."),
            new_code_cell(SET_UP, id="setup", execution_count=1, outputs=[printed]),
            new_code_cell("plot(x)", execution_count=2, outputs=[picture]),
            new_markdown_cell(
                "## The end\n\n[All lessons](../README.md), [web](https://example.org/a)."
            ),
            new_markdown_cell(f"### Exercise 1: add\n\n{TAKES}"),
            new_code_cell("print(lesson.environment())", execution_count=3, outputs=[printed]),
        ],
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
        },
    )


@pytest.fixture
def lesson(tmp_path: Path) -> Path:
    """The path of a lesson that has its solutions, in a folder with a README."""
    (tmp_path / "README.md").write_text("# Course\n\n## Two words\n")
    (tmp_path / "notebooks/solutions").mkdir(parents=True)
    for folder in ("notebooks", "notebooks/solutions"):
        nbformat.write(good(), tmp_path / folder / "01_sums.ipynb")
    return tmp_path / "notebooks/01_sums.ipynb"


def code(source: str, *outputs: NotebookNode) -> Callable[[NotebookNode], None]:
    """A change: the first code cell gets another source, and other outputs where some are given."""

    def change(nb: NotebookNode) -> None:
        nb.cells[1].source = source
        nb.cells[1].outputs = list(outputs) or nb.cells[1].outputs

    return change


def text(source: str) -> Callable[[NotebookNode], None]:
    """A change: the last section gets another text."""
    return lambda nb: nb.cells[3].update(source=source)


def out(kind: str, value: str) -> NotebookNode:
    return new_output("display_data", data={kind: value})


ERROR = new_output("error", ename="KeyError", evalue="'x'", traceback=[])
STDERR = new_output("stream", name="stderr", text="UserWarning")

BROKEN = [
    (rules.counts_run_from_one, lambda nb: nb.cells[2].update(execution_count=3), "count 3"),
    (rules.counts_run_from_one, lambda nb: nb.cells[1].update(execution_count=None), "count None"),
    (rules.counts_run_from_one, lambda nb: nb.cells[1].update(execution_count=2), "cell 1"),
    (rules.printing_cells_have_output, lambda nb: nb.cells[1].update(outputs=[]), "it prints"),
    (
        rules.printing_cells_have_output,
        lambda nb: nb.cells[1].update(source='lesson.claim("a", True)', outputs=[]),
        "it prints",
    ),
    (
        rules.printing_cells_have_output,
        lambda nb: [nb.cells[i].update(outputs=[]) for i in (1, 2, 5)],
        "no cell has a stored output",
    ),
    (rules.errors_are_announced, code("{}['x']", ERROR), "KeyError"),
    (rules.nothing_on_stderr, code("warn()", STDERR), "UserWarning"),
    (rules.claims_are_checked, code("print(2)"), "checks anything"),
    (rules.numbers_in_prose_are_printed, text("It gains 17 % here."), "17"),
    (rules.numbers_in_prose_are_printed, text("A loss of 2.1, then 2.0."), "2.1"),
    (rules.no_absolute_path, code("open('/home/me/a')"), "/home"),
    (rules.no_absolute_path, code("import sys; sys.path.append('/root')"), "/root"),
    (rules.no_absolute_path, code(r"open('C:\Users\me')"), "source"),
    (rules.no_absolute_path, code(r"open('C:\\data')"), "source"),
    (rules.no_absolute_path, code("x", out("text/html", "<b>/Users/me/x</b>")), "output"),
    (rules.no_absolute_path, text("It lies in `/tmp/run`."), "cell 3"),
    (rules.no_secret, code("key = 's" + "k-" + "a1B2" * 6 + "'"), "source"),
    (rules.no_secret, code("print(t)", out("text/plain", "h" + "f_" + "a1B2c" * 5)), "output"),
    (rules.no_secret, text("g" + "hp_" + "a1B2" * 9), "cell 3"),
    (rules.no_secret, text("token=" + "0a1b" * 12), "cell 3"),
    (rules.no_install_no_login, code("!pip install trl"), "pip install"),
    (rules.no_install_no_login, code("%pip install trl"), "pip install"),
    (rules.no_install_no_login, code("!huggingface-cli login"), "login"),
    (rules.no_install_no_login, code("notebook_login()"), "login"),
    (rules.valid, lambda nb: nb.cells[1].pop("outputs"), "not a valid notebook"),
    (rules.cells_have_ids, lambda nb: nb.cells[1].pop("id"), "no id"),
    (rules.cells_have_ids, lambda nb: nb.cells[1].update(id=nb.cells[2].id), "twice"),
    (rules.kernel_is_python3, lambda nb: nb.metadata.kernelspec.update(name="sft"), "'sft'"),
    (rules.kernel_is_python3, lambda nb: nb.metadata.pop("kernelspec"), "None"),
    (rules.metadata_is_clean, lambda nb: nb.metadata.update(widgets={"a": {}}), "the notebook"),
    (
        rules.metadata_is_clean,
        lambda nb: nb.metadata.update(language_info={"name": "python", "version": "3.11.7"}),
        "the notebook",
    ),
    (
        rules.metadata_is_clean,
        lambda nb: nb.cells[1].metadata.update(execution={"iopub.execute_input": "now"}),
        "cell 1",
    ),
    (rules.images_are_described, lambda nb: nb.cells.__delitem__(slice(3, 5)), "without words"),
    (rules.images_are_described, code("x", out("text/html", '<img src="a.png">')), "alternative"),
    (rules.images_are_described, text("![](../README.md)"), "alternative"),
    (rules.links_lead_somewhere, text("[x](missing.md)"), "no such file"),
    (rules.links_lead_somewhere, text("![a curve](pictures/a.png)"), "no such file"),
    (rules.links_lead_somewhere, text("[x](#nowhere)"), "no such heading"),
    (rules.links_lead_somewhere, text("[x](../README.md#nowhere)"), "no such heading"),
    (rules.links_lead_somewhere, text("[x](http://localhost)"), "host"),
    (rules.links_lead_somewhere, text("[x](htp://example.org)"), "neither"),
    (rules.links_lead_somewhere, text('<a href="missing.html">x</a>'), "no such file"),
    (rules.opens_with_title_and_promise, lambda nb: nb.cells[0].update(source="# Sums"), "begin"),
    (
        rules.opens_with_title_and_promise,
        lambda nb: nb.cells[0].update(source="# Lesson 1: Sums\n\nAdding."),
        "promise",
    ),
    (rules.lesson_begins_itself, lambda nb: nb.cells[1].update(id="first"), "the id 'setup'"),
    (rules.lesson_begins_itself, code('work = lesson.begin("02_sums")'), "01_sums"),
    (rules.lesson_begins_itself, code('lesson.begin("01_sums")'), "work = "),
    (rules.lesson_ends_with_its_versions, lambda nb: nb.cells.pop(5), "environment()"),
    (
        rules.exercises_say_what_they_take,
        lambda nb: nb.cells[4].update(source="### Exercise 1: add (easy)\n\nAdd."),
        "add (easy)",
    ),
    (
        rules.exercises_say_what_they_take,
        lambda nb: nb.cells[4].update(source=f"### Exercise 2: add\n\n{TAKES}"),
        "Exercise 2",
    ),
]


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_a_good_notebook_passes(rule: rules.Rule, lesson: Path):
    assert rule(good(), lesson) == []


@pytest.mark.parametrize(
    "rule, change, expected", BROKEN, ids=lambda value: getattr(value, "__name__", None)
)
def test_a_broken_notebook_is_noticed(rule, change, expected, lesson: Path):
    nb = good()
    change(nb)
    problems = rule(nb, lesson)
    assert problems and any(expected in problem for problem in problems), problems


def test_a_lesson_without_solutions_is_noticed(lesson: Path):
    (lesson.parent / "solutions" / lesson.name).unlink()
    assert "missing in solutions/" in rules.lesson_and_solutions_are_twins(good(), lesson)[0]


def test_solutions_without_a_lesson_are_noticed(lesson: Path):
    lesson.unlink()
    solutions = lesson.parent / "solutions" / lesson.name
    assert "missing in notebooks/" in rules.lesson_and_solutions_are_twins(good(), solutions)[0]


def test_every_rule_was_broken_once():
    tested = {rule for rule, _, _ in BROKEN} | {rules.lesson_and_solutions_are_twins}
    assert tested == set(rules.RULES)


@pytest.mark.parametrize(
    "rule, change",
    [
        (
            rules.no_absolute_path,
            code(r'print("Q:\nA:\nB and/or C, home/work, https://a.org/home/x")'),
        ),
        (rules.no_absolute_path, code("plot()", out("image/png", "a/tmp/b"))),
        (
            rules.no_secret,
            code(f"load('x', revision='{'0a1b' * 10}')  # risk-averse, task-specific"),
        ),
        (rules.no_install_no_login, text("You need no `pip install` and no login.")),
        (
            rules.links_lead_somewhere,
            text("## The end\n[x](../README.md#two-words), `[y](z)`, [w](01_sums.ipynb#The-end)"),
        ),
        (
            rules.numbers_in_prose_are_printed,
            text(
                "2 and 2.0, 0.02 or 200 %; section 17, `18`, $19$, in 2024, a few: 7.\n"
                "\n21 % ([Doe 2024](https://example.org/a))"
            ),
        ),
        (rules.printing_cells_have_output, code("if False:\n    print(1)", STDERR)),
        (rules.claims_are_checked, code('lesson.claim("2 is 1 + 1", x == 2)')),
    ],
)
def test_a_rule_does_not_cry_wolf(rule, change, lesson: Path):
    nb = good()
    change(nb)
    assert rule(nb, lesson) == []


def test_an_announced_error_is_allowed(lesson: Path):
    nb = good()
    code("{}['x']", ERROR)(nb)
    nb.cells[1].metadata["tags"] = ["raises-exception"]
    assert rules.errors_are_announced(nb, lesson) == []


# --- The tool that executes them -----------------------------------------------------------------


def test_checkpoints_are_no_notebooks(lesson: Path):
    copy = lesson.parent / ".ipynb_checkpoints/01_sums-checkpoint.ipynb"
    copy.parent.mkdir()
    copy.write_text("{}")
    found = notebooks.find("1", lesson.parent)
    assert [path.parent.name for path in found] == ["notebooks", "solutions"]


@pytest.mark.integration
def test_clean_agrees_with_the_rule(lesson: Path):
    nb = good()
    nb.metadata["widgets"] = {"a": {}}
    nb.cells[1].metadata["execution"] = {"iopub.execute_input": "now"}
    nbformat.write(nb, lesson)
    assert notebooks.clean([lesson], verify=True) != 0
    assert notebooks.clean([lesson]) == 0
    assert notebooks.clean([lesson], verify=True) == 0
    cleaned = nbformat.read(lesson, 4)
    assert rules.metadata_is_clean(cleaned, lesson) == []
    assert cleaned.cells[1].outputs == good().cells[1].outputs


def test_a_dotenv_file_changes_neither_tests_nor_what_is_stored(lesson: Path, monkeypatch):
    """Nor does a variable of this machine change the tests."""
    settings = [os.environ[name] for name in notebooks.SETTINGS]
    monkeypatch.chdir(lesson.parent)
    (lesson.parent / ".env").write_text("SFT_MODEL=nobody/nothing\nSFT_DEEPSPEED=stored\n")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert models.chosen() == models.DEFAULT
    assert "SFT_DEEPSPEED" not in launch.unavailable()
    assert settings == ["recording", "", ""]

    for name in notebooks.SETTINGS:
        del os.environ[name]
    seen = {}
    failed = SimpleNamespace(returncode=1)
    monkeypatch.setattr(notebooks, "FOLDER", lesson.parent)
    monkeypatch.setattr(notebooks.subprocess, "run", lambda _, env: seen.update(env) or failed)
    notebooks.run(lesson)
    assert seen.items() >= notebooks.SETTINGS.items()


@pytest.mark.integration
def test_run_stores_outputs_or_leaves_the_file_alone(lesson: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(notebooks, "FOLDER", lesson.parent)
    nb = good()
    del nb.cells[2:]
    nb.cells[1].source = "print(6 * 7)"
    nbformat.write(nb, lesson)
    assert notebooks.run(lesson)
    assert nbformat.read(lesson, 4).cells[1].outputs[0].text == "42\n"
    assert rules.metadata_is_clean(nbformat.read(lesson, 4), lesson) == []

    nb.cells[1].source = "1 / 0"
    nbformat.write(nb, lesson)
    before = lesson.read_bytes()
    assert not notebooks.run(lesson)
    assert lesson.read_bytes() == before
    assert sorted(p.name for p in lesson.parent.iterdir()) == ["01_sums.ipynb", "solutions"]
