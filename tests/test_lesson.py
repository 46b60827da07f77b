"""After a restart any cell of a lesson can be run: what it needs of earlier ones is run first."""

import json
from pathlib import Path

from sftlib import lesson
from sftlib.lesson import environment
from sftlib.lesson.cells import Cells, names

import pytest
from IPython.core.interactiveshell import InteractiveShell

CELLS = {
    "setup": "import math\nfrom sftlib import lesson\nmodel = 'base'\nran = ['setup']",
    "data": "rows = [1, 2]\nran.append('data')",
    "train": "model = f'tuned on {sum(rows)}'\nran.append('train')",
    "more": "rows.append(3)\nran.append('more')",
    "ask": "answer = f'{model}, {len(rows)} rows'\nprint('asked')",
    "apart": "alone = math.pi",
    "broken": "oops = undefined_name",
    "after-broken": "print(oops)",
}


def notebook(cells: dict[str, str]) -> dict:
    """A notebook with a cell for each text, as nbformat stores it."""
    return {
        "cells": [
            {"cell_type": "code", "id": name, "source": text.splitlines(keepends=True)}
            for name, text in cells.items()
        ]
    }


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """A kernel's shell in a folder with the notebook above, in which the set-up cell was run."""
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    Path("00_short.ipynb").write_text(json.dumps(notebook(CELLS)))
    shell = InteractiveShell.instance()
    shell.run_cell(CELLS["setup"] + "\nlesson.begin('00_short')", cell_id="setup")
    yield shell
    InteractiveShell.clear_instance()


def run(shell, name: str, capsys) -> str:
    capsys.readouterr()
    shell.run_cell(CELLS[name], cell_id=name)
    return capsys.readouterr().out


def test_what_a_cell_needs_is_run_first_in_order_and_named(shell, capsys):
    said = run(shell, "ask", capsys)
    assert said.startswith("First running data, train, more …")
    assert said.endswith("asked\n")
    assert shell.user_ns["answer"] == "tuned on 3, 3 rows"


def test_in_order_nothing_is_run_twice_and_nothing_is_said(shell, capsys):
    said = [run(shell, name, capsys) for name in ("data", "train", "more", "ask", "apart")]
    assert said == ["", "", "", "asked\n", ""]
    assert shell.user_ns["ran"] == ["setup", "data", "train", "more"]


def test_going_back_leaves_what_is_there(shell, capsys):
    run(shell, "ask", capsys)
    assert run(shell, "data", capsys) == ""
    assert run(shell, "ask", capsys) == "asked\n"
    assert shell.user_ns["answer"] == "tuned on 3, 2 rows"


def test_a_cell_that_needs_nothing_runs_alone(shell, capsys):
    assert run(shell, "apart", capsys) == ""
    assert "rows" not in shell.user_ns


def test_a_cell_is_known_by_its_text_where_no_id_is_sent(shell, capsys):
    shell.run_cell(CELLS["ask"])
    assert "First running data, train, more" in capsys.readouterr().out


def test_of_an_edited_cell_the_place_counts_and_what_it_uses_now(shell, capsys):
    shell.run_cell("print(model.upper())", cell_id="ask")
    said = capsys.readouterr().out
    assert said.startswith("First running data, train …")
    assert said.endswith("TUNED ON 3\n")


def test_a_cell_of_ones_own_is_left_alone(shell, capsys):
    shell.run_cell("mine = model", cell_id="new")
    assert capsys.readouterr().out == ""
    assert shell.user_ns["mine"] == "base"


def test_a_failure_of_a_needed_cell_is_named(shell, capsys):
    assert "broken failed. Run it alone to see why." in run(shell, "after-broken", capsys)


def interrupted(_):
    raise KeyboardInterrupt


def test_after_an_interrupt_what_was_not_run_is_needed_still(shell, capsys):
    shell.user_ns["sum"] = interrupted  # in train, which the cell ask needs between two others
    assert "train failed." in run(shell, "ask", capsys)
    del shell.user_ns["sum"]
    assert run(shell, "train", capsys) == ""
    assert run(shell, "ask", capsys).startswith("First running more …")
    assert shell.user_ns["answer"] == "tuned on 3, 3 rows"


def test_a_cell_that_failed_is_needed_still(shell, capsys):
    shell.user_ns["sum"] = interrupted
    run(shell, "train", capsys)
    del shell.user_ns["sum"]
    assert run(shell, "ask", capsys).startswith("First running train, more …")


def test_of_two_cells_with_one_text_each_is_run_once(shell, capsys):
    cells = {"rows": "rows = []", "one": "rows.append(1)", "two": "rows.append(1)", "ask": "rows"}
    Path("00_twice.ipynb").write_text(json.dumps(notebook(cells)))
    lesson.begin("00_twice")
    for _ in range(2):
        shell.run_cell("rows", cell_id="ask")
    assert capsys.readouterr().out.count("First running rows, one, two …") == 1
    assert shell.user_ns["rows"] == [1, 1]


@pytest.mark.integration
def test_set_up_run_again_begins_anew(shell, capsys):
    run(shell, "ask", capsys)
    shell.run_cell(CELLS["setup"] + "\nlesson.begin('00_short')", cell_id="setup")
    assert run(shell, "ask", capsys).startswith("First running data, train, more …")


def test_without_the_notebook_or_a_kernel_there_is_the_work_folder_and_nothing_is_run(
    tmp_path, monkeypatch
):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert lesson.begin("00_short") == Path("../work/00_short")
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == [
        "notebooks",
        "work",
        "work/00_short",
    ]


# --- The work folder -----------------------------------------------------------------------------

WITH_FILES = {
    "setup": "from sftlib import lesson\nfrom pathlib import Path\nran = []\n",
    "train": "def save(path):\n    path.mkdir()\n    (path / 'weights').write_text('long training')"
    "\n\n\nran.append('train')\nsave(work / 'adapter')",
    "apart": "ran.append('apart')",
    "ask": "text = (work / 'adapter' / 'weights').read_text()",
}


@pytest.fixture
def work(shell) -> Path:
    """The work folder of a lesson whose cells write and read a folder, the set-up cell run."""
    Path("00_files.ipynb").write_text(json.dumps(notebook(WITH_FILES)))
    set_up(shell)
    return Path("../work/00_files")


def set_up(shell):
    source = WITH_FILES["setup"] + "work = lesson.begin('00_files')"
    assert shell.run_cell(source, cell_id="setup").success


@pytest.mark.integration
def test_the_work_folder_is_empty_at_the_start_and_beside_the_notebooks(shell, work):
    assert shell.user_ns["work"] == work
    (work / "old").mkdir()
    (work / "old/checkpoint.pt").write_text("of another run")
    neighbour = work.parent / "llama3"
    neighbour.mkdir()
    set_up(shell)
    assert list(work.iterdir()) == [] and neighbour.exists()


@pytest.mark.integration
def test_in_order_what_was_written_is_kept_and_written_once(shell, work, capsys):
    for name in ("train", "apart", "ask", "ask"):
        shell.run_cell(WITH_FILES[name], cell_id=name)
    assert capsys.readouterr().out == ""
    assert shell.user_ns["text"] == "long training" and (work / "adapter/weights").exists()


@pytest.mark.integration
def test_after_set_up_again_the_cell_that_wrote_a_file_is_run_before_the_one_that_reads_it(
    shell, work, capsys
):
    """What `begin` empties is written again; no cell is left without its file."""
    shell.run_cell(WITH_FILES["train"], cell_id="train")
    set_up(shell)
    assert not (work / "adapter").exists()
    capsys.readouterr()
    result = shell.run_cell(WITH_FILES["ask"], cell_id="ask")
    assert capsys.readouterr().out.startswith("First running train …")
    assert result.success and shell.user_ns["text"] == "long training"
    assert shell.user_ns["ran"] == ["train"]


@pytest.mark.parametrize("name", ["", ".", "..", "../llama3", "a/b", "/no/such/place"])
def test_no_other_folder_can_be_emptied(tmp_path, monkeypatch, name):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "work/llama3").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "notebooks")
    with pytest.raises(ValueError, match="such as '01_topic'"):
        lesson.begin(name)
    assert (tmp_path / "work/llama3").exists()


B_C_D = ("/b", "/c", "/d")


@pytest.mark.parametrize(
    ("source", "used", "made"),
    [
        ("a = b", {"b"}, {"a"}),
        ("a = a + 1", {"a"}, {"a"}),
        ("a += 1", {"a"}, {"a"}),
        ("import a.b as c\nc.d()", set(), {"c"}),
        ("for a in b:\n    print(a)", {"b"}, {"a"}),
        ("with open(a) as b:\n    b.read()", {"a"}, {"b"}),
        ("c = [a for a in b if a]", {"b"}, {"c"}),
        ("d = {a: c for a, c in b.items()} | {a for a in e}", {"b", "e"}, {"d"}),
        ("f(a, [a for a in b])", {"f", "a", "b"}, set()),
        ("def f(a):\n    return a + b", {"b"}, {"f"}),
        ("def f():\n    return g()\ndef g():\n    return 1", {"g"}, {"f", "g"}),
        ("a = lambda b: b + c", {"c"}, {"a"}),
        ("class A(B):\n    x = c", {"B", "c"}, {"A"}),
        ("a = 1\nb = a", set(), {"a", "b"}),
        ("(a, b), *c = d", {"d"}, {"a", "b", "c"}),
        ("print(f'{a:.{b}f}')", {"a", "b"}, set()),
        ("!ls a", set(), set()),
        ("!ls {a}", {"a"}, set()),
        ("if a:\n    %run b --x {c}/d", {"a", "c"}, set()),
        ("torch.save(a, work / 'b.pt')", {"torch", "a", "work"}, {"/b.pt"}),
        ("f = save_adapter(a, '../work/b')", {"save_adapter", "a"}, {"f", "/b"}),
        ("load(work / 'b.pt', '../work/c', 'd')", {"load", "work", "/b.pt", "/c"}, set()),
        ("f = save_adapter(a, work / 'b')", {"save_adapter", "a", "work"}, {"f", "/b"}),
        ("load(work / 'b', str(work / 'c' / 'd'))", {"load", "str", "work", *B_C_D}, set()),
        ("a = b / c", {"b", "c"}, {"a"}),
        ("'a sentence with a full stop.'", set(), set()),
        ("lesson.predict('a', 'Which?', 'x', 'y')", {"lesson"}, {"?a"}),
        ("lesson.outcome('a', b)", {"lesson", "b", "?a"}, set()),
        ("model.predict(a)\nmodel.predict()", {"model", "a"}, set()),
        ("%%writefile ../work/a.py\nfrom b import c\nd(x / 'e.pt')", {"/b.py", "/e.pt"}, {"/a.py"}),
    ],
)
def test_names_used_and_made(source, used, made):
    found = names(source)
    assert found.used - {"print", "open", "get_ipython"} == used
    assert found.made == made


def test_a_script_that_a_cell_wrote_is_written_first_with_what_it_reads():
    texts = {
        "data": "work = 'w'\ntorch.save(1, f'{work}/' + 'rows.pt')",
        "common": "%%writefile w/common.py\nrows = load('rows.pt')",
        "script": "%%writefile w/script.py\nfrom common import rows",
        "other": "%%writefile w/other.py\nfrom common import rows",
        "run": "launch('w/script.py')",
    }
    cells = Cells(notebook(texts)["cells"])
    assert cells.needed(4, texts["run"], set()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("source", "changed"),
    [
        ("a.append(1)", {"a"}),
        ("a.b.c = 1", {"a"}),
        ("a['b'] = 1", {"a"}),
        ("del a['b']", {"a"}),
        ("b = a.train()", {"a"}),
        ("a.b[0].update(c=1)", {"a"}),
        ("a.read()", set()),
        ("a.b.items()", set()),
    ],
)
def test_names_changed(source, changed):
    assert names(source).changed == changed


def test_needs_of_needs_are_found():
    cells = Cells(notebook({"a": "x = 1", "b": "y = x", "c": "z = y", "d": "z"})["cells"])
    assert cells.needed(3, "z", set()) == [0, 1, 2]
    assert cells.needed(3, "z", {2}) == []
    assert cells.needed(3, "z", {1}) == [2]


def test_the_last_maker_counts():
    cells = Cells(notebook({"a": "x = 1", "b": "x = 2", "c": "x", "d": "x = 3"})["cells"])
    assert cells.needed(2, "x", set()) == [1]


def test_the_environment_is_named_with_its_versions():
    import trl

    assert f"trl {trl.__version__}" in environment()
    assert environment().startswith("Python 3.")
