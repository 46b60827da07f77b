"""`make fresh`: copies of the lessons without outputs, which run, and never replace a student's."""

import json
import os
import subprocess
from pathlib import Path

import nbformat
import pytest

from tests import notebook_rules as rules
from tools import copies, fresh, notebooks

ROOT = Path(__file__).parents[1]
LESSONS = [path for path in notebooks.find() if path.parent.name == "notebooks"]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The folder `work` of a copy of the course."""
    return copies.course(tmp_path, "notebooks") / "work"


def make(work: Path, capsys) -> str:
    assert fresh.main(work.parent) == 0
    return capsys.readouterr().out


def change(path: Path, cell: int = -1, **values) -> None:
    nb = json.loads(path.read_text(encoding="utf-8"))
    code = [one for one in nb["cells"] if one["cell_type"] == "code"]
    code[cell].update(values)
    path.write_text(json.dumps(nb), encoding="utf-8")


def test_every_lesson_is_copied_without_outputs_and_counts(work, capsys):
    said = make(work, capsys)
    assert sorted(path.name for path in work.iterdir()) == [path.name for path in LESSONS]
    assert said.startswith(f"work/: {len(LESSONS)} lessons without outputs.")
    for path in LESSONS:
        copy, lesson = nbformat.read(work / path.name, 4), nbformat.read(path, 4)
        nbformat.validate(copy)
        assert [cell.id for cell in copy.cells] == [cell.id for cell in lesson.cells]
        for one, other in zip(copy.cells, lesson.cells, strict=True):
            assert one.cell_type == other.cell_type and one.metadata == other.metadata
            if one.cell_type == "code":
                assert one.source == other.source
                assert one.outputs == [] and one.execution_count is None


def test_links_of_the_copies_lead_somewhere(work, capsys):
    make(work, capsys)
    for path in work.glob("*.ipynb"):
        nb = nbformat.read(path, 4)
        assert rules.links_lead_somewhere(nb, path) == []
        text = "".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
        assert "](../notebooks/pitfalls.md)" in text
        assert "../notebooks/0" not in text  # another lesson is another copy


@pytest.mark.parametrize(
    ("link", "turned"),
    [
        ("[a](pitfalls.md)", "[a](../notebooks/pitfalls.md)"),
        ("[a](glossary.md#loss)", "[a](../notebooks/glossary.md#loss)"),
        ("[a](solutions/01_a.ipynb)", "[a](../notebooks/solutions/01_a.ipynb)"),
        ('<img alt="x" src="b.png">', '<img alt="x" src="../notebooks/b.png">'),
        ("[a](01_a.ipynb), [a](01_a.ipynb#B)", "[a](01_a.ipynb), [a](01_a.ipynb#B)"),
        ("[a](../data/x.md), [b](#c)", "[a](../data/x.md), [b](#c)"),
        ("[a](https://example.org/a), ![b](attachment:c.png)",) * 2,
    ],
)
def test_links_are_turned_where_they_must_be(link, turned):
    assert fresh.turned(link, {"01_a.ipynb"}) == turned


def test_a_second_time_changes_nothing(work, capsys):
    said = make(work, capsys)
    before = {path: path.stat().st_mtime_ns for path in work.iterdir()}
    assert make(work, capsys) == said
    assert {path: path.stat().st_mtime_ns for path in work.iterdir()} == before


@pytest.mark.parametrize(
    "values",
    [
        {"source": "answer = 42"},
        {"execution_count": 3},
        {"outputs": [nbformat.v4.new_output("stream", text="mine")]},
    ],
)
def test_a_copy_that_was_changed_or_run_is_kept_and_named(values, work, capsys):
    make(work, capsys)
    mine = work / LESSONS[1].name
    change(mine, **values)
    before = mine.read_bytes()
    said = make(work, capsys)
    assert mine.read_bytes() == before
    assert f"kept as they are: {mine.name}" in said and LESSONS[0].name not in said
    mine.unlink()
    assert "kept" not in make(work, capsys) and mine.exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"cells": 3}', '{"cells": [], "metadata": {}}'])
def test_a_file_of_somebody_elses_making_is_kept(text, work, capsys):
    mine = work / LESSONS[0].name
    mine.write_text(text)
    assert "kept as they are" in make(work, capsys) and mine.read_text() == text


def test_a_copy_that_was_only_saved_gives_way_to_a_new_edition(work, capsys):
    make(work, capsys)
    copy, lesson = work / LESSONS[0].name, work.parent / "notebooks" / LESSONS[0].name
    saved = json.loads(copy.read_text(encoding="utf-8"))
    saved["metadata"]["language_info"] = {"name": "python"}  # as JupyterLab does
    saved["cells"][0]["source"] = "".join(saved["cells"][0]["source"])
    copy.write_text(json.dumps(saved))
    change(lesson, 0, source="print('a new edition')")
    assert "kept" not in make(work, capsys) and "a new edition" in copy.read_text()


@pytest.mark.integration
def test_a_copy_runs_where_it_lies(work, capsys):
    """The set-up reads `../data`, a cell writes below `../work`; the rest is left out, for time."""
    make(work, capsys)
    copy = work / "05_deepspeed.ipynb"
    nb = nbformat.read(copy, 4)
    ids = [cell.id for cell in nb.cells]
    nb.cells = [nb.cells[ids.index(name)] for name in ("setup", "common")]
    nbformat.write(nb, copy)
    settings = os.environ | {"PYTHONPATH": str(work.parent), "SFT_NO_BARS": "1"}
    settings.pop("PYTEST_CURRENT_TEST", None)
    subprocess.run([*notebooks.NBCONVERT, "--inplace", str(copy)], env=settings, check=True)
    assert (work / "05_deepspeed" / "common.py").exists() and not (work / "work").exists()


@pytest.mark.nightly
def test_a_whole_copy_runs_where_it_lies(work, capsys):
    make(work, capsys)
    copy = work / "03_chatml.ipynb"
    settings = os.environ | {"PYTHONPATH": str(work.parent), "SFT_NO_BARS": "1"}
    settings.pop("PYTEST_CURRENT_TEST", None)
    subprocess.run([*notebooks.NBCONVERT, "--inplace", str(copy)], env=settings, check=True)
    ran, stored = nbformat.read(copy, 4), nbformat.read(ROOT / "notebooks" / copy.name, 4)
    for one, other in zip(ran.cells, stored.cells, strict=True):
        assert len(one.get("outputs", [])) == len(other.get("outputs", [])), one.id
