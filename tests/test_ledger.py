"""The ledger of claims agrees with the stored outputs, and is not written where it would not."""

import json
import sys
from pathlib import Path

from sftlib.lesson.claims import line

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools import claims, newest, notebooks
from tools.stored_runs import real

ROOT = claims.ROOT
STORED = claims.stored(ROOT)
LESSONS = {path.stem for path in notebooks.FOLDER.glob("[0-9][0-9]_*.ipynb")}
LESSONS |= {row["lesson"] for row in STORED}
ROW = {
    **{"lesson": "01_ask", "run": "a", "id": "answers", "text": "Most answers are right"},
    **{"kind": "seeds", "bound": "above half", "measured": "90%", "seeds": 3, "holds": True},
    **{"model": "tiny-base", "machine": "AMD", "versions": {"torch": "2"}, "date": "2026-01-01"},
}
SECOND = ROW | {"id": "answers/2", "text": "No answer is long", "measured": "", "seeds": 1}
SECOND |= {"kind": "one run"}
PRINTED = "✓ Most answers are right: 90% (3 seeds)\n✓ No answer is long\n"
SOURCE = 'lesson.claim("Most answers are right", True, "90%", seeds=3)\n'
SOURCE += 'lesson.claim("No answer is long", True)'
SET_UP = 'from sftlib import lesson\n\nwork = lesson.begin("01_ask")'


@pytest.mark.parametrize("name", sorted(LESSONS))
def test_what_the_notebook_shows_and_what_the_ledger_says_is_the_same(name):
    rows = [row for row in STORED if row["lesson"] == name]
    assert claims.problems(ROOT / "notebooks" / f"{name}.ipynb", rows) == []


def test_the_page_is_current():
    current = (ROOT / "notebooks" / "claims.md").read_text(encoding="utf-8")
    assert claims.page(STORED, ROOT) == current, "The page is not current. Run: make format"


# --- A course of one lesson ----------------------------------------------------------------------


def write(path: Path, source: str = SOURCE, printed: str = PRINTED) -> Path:
    folded = {"tags": ["claim"], "jupyter": {"source_hidden": True}}
    outputs = [new_output("stream", name="stdout", text=printed)] if printed else []
    cells = [
        new_markdown_cell("# Lesson 1: Ask\n> You ask.", id="title"),
        new_code_cell(SET_UP, id="setup"),
        new_code_cell(source, id="answers", outputs=outputs, metadata=folded),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


@pytest.fixture
def course(tmp_path, monkeypatch) -> Path:
    """The folder of a course with one lesson, whose last run claimed what it shows."""
    for folder in ("notebooks", "data", "work"):
        (tmp_path / folder).mkdir()
    write(tmp_path / "notebooks" / "01_ask.ipynb")
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path / "notebooks")
    ran(tmp_path, ROW, SECOND)
    return tmp_path


def ran(course: Path, *rows: dict) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (course / "work" / "claims.jsonl").write_text(text)


def ledger(course: Path) -> list[dict]:
    return json.loads((course / "data" / "claims.json").read_text())


def test_the_claims_of_the_last_run_are_written_with_a_page(course, capsys):
    assert claims.main() == 0
    assert [line(row) for row in ledger(course)] == PRINTED.splitlines()
    assert ledger(course)[0] == {name: value for name, value in ROW.items() if name != "run"}
    page = (course / "notebooks" / "claims.md").read_text()
    assert "## Lesson 1: [Ask](01_ask.ipynb)" in page
    assert "| Most answers are right | 90% | above half | seeds | 3 |" in page
    assert "2 claims of 1 lessons" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "01_ask: its run left no row. Run: make run NB=01"),
        ([ROW], "01_ask, answers: the run printed"),
        ([ROW, SECOND | {"holds": False}], "01_ask, answers/2 fails: No answer"),
        ([ROW | {"measured": "91%"}, SECOND], "the notebook shows ['✓ Most answers are right: 90%"),
        ([ROW | {"seeds": 5}, SECOND], "(5 seeds)"),
        ([ROW, SECOND, SECOND | {"id": "own"}], "01_ask, own: the run printed"),
        ([ROW, SECOND | {"text": ROW["text"]}], "claimed twice: Most answers are right"),
        ([ROW | {"model": "other"}, SECOND | {"model": "other"}], "its run left no row"),
    ],
)
def test_where_something_is_wrong_nothing_is_written_and_it_is_said(course, capsys, rows, said):
    ran(course, *rows)
    assert claims.main() == 1
    assert said in capsys.readouterr().err
    assert not (course / "data" / "claims.json").exists()
    assert not (course / "notebooks" / "claims.md").exists()


def test_a_lesson_without_claims_is_named(course, capsys):
    write(course / "notebooks" / "02_more.ipynb")
    notebook = json.loads((course / "notebooks" / "02_more.ipynb").read_text())
    notebook["cells"].pop()
    (course / "notebooks" / "02_more.ipynb").write_text(json.dumps(notebook))
    assert claims.main() == 1
    assert capsys.readouterr().err.endswith("02_more: no cell makes a claim. Add lesson.claim(…)\n")


def test_a_row_changes_only_if_something_but_its_date_does(course):
    assert claims.main() == 0
    later = {"date": "2027-01-01", "run": "b"}
    ran(course, ROW | later, SECOND | later | {"versions": {"torch": "3"}})
    assert claims.main() == 0
    assert [row["date"] for row in ledger(course)] == ["2026-01-01", "2027-01-01"]


def test_rows_stand_in_the_order_of_the_lessons_and_of_their_cells(course):
    others = [ROW | {"lesson": name} for name in ("00_before", "03_after")]
    notebook = course / "notebooks" / "01_ask.ipynb"
    tenth = ROW | {"id": "answers/10"}
    rows = claims.merged([*reversed(others), SECOND], [tenth, SECOND, ROW], notebook)
    places = [(row["lesson"], row["id"]) for row in rows]
    ids = ("answers", "answers/2", "answers/10")
    assert places == [
        ("00_before", "answers"),
        *(("01_ask", i) for i in ids),
        (
            "03_after",
            "answers",
        ),
    ]


def test_control_tokens_and_signs_of_markdown_stay_what_they_are_on_the_page(course):
    row = ROW | {"text": "`<|im_end|>` is a_token", "measured": "<|im_end|> 2*3 for $5"}
    table = claims.page([row], course).splitlines()[-1]
    assert (
        table
        == r"| `<\|im_end\|>` is a\_token | \<\|im\_end\|> 2\*3 for \$5 | above half | seeds | 3 |"
    )


# --- What `make newest` and `make real` say ------------------------------------------------------


def test_the_difference_names_what_fails_what_changed_and_what_is_missing():
    gone = ROW | {"text": "Each answer ends"}
    same = ROW | {"text": "It is fast"}
    now = [
        ROW | {"measured": "80%"},
        SECOND | {"holds": False, "measured": "300 tokens"},
        same,
        ROW | {"text": "It is new"},
    ]
    assert claims.difference([ROW, SECOND, gone, same, ROW | {"lesson": "02_more"}], now) == [
        "01_ask: 3 of 4 claims hold",
        "  ✗ No answer is long: 300 tokens (in the ledger: nothing measured)",
        "  ~ Most answers are right: 80% (in the ledger: 90%)",
        "  ? not reached: Each answer ends",
        "  + not in the ledger: It is new",
    ]


def test_without_a_difference_only_the_number_is_said():
    assert claims.difference([ROW], [ROW]) == ["01_ask: 1 of 1 claims hold"]
    assert claims.difference([ROW], []) == ["No lesson made a claim."]
    assert claims.difference([ROW], [], ["01_ask", "02_more"]) == [
        "01_ask: 0 of 0 claims hold",
        "  ? not reached: Most answers are right",
    ]


@pytest.mark.integration
def test_make_newest_says_what_becomes_of_the_claims(course, monkeypatch, capsys):
    assert claims.main() == 0
    monkeypatch.setattr(newest, "ROOT", course)
    monkeypatch.setattr(newest, "PLACE", course / "work" / "newest")
    (course / "sftlib").symlink_to(ROOT / "sftlib")
    changed = SOURCE.replace("90%", "80%").replace("long", "short")
    write(course / "notebooks" / "01_ask.ipynb", changed.replace("True", "2 < 1", 1))
    capsys.readouterr()
    assert newest.run_lessons(sys.executable) == 1
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "01_ask: 0 of 1 claims hold",
        "  ✗ Most answers are right: 80% (in the ledger: 90%)",
        "  ? not reached: No answer is long",
    ]


@pytest.mark.integration
def test_make_real_says_which_claims_hold_with_its_model(course, monkeypatch, capsys):
    assert claims.main() == 0
    for name, value in {"ROOT": course, "WORK": course / "work", "LESSONS": {"01": ()}}.items():
        monkeypatch.setattr(real, name, value)
    monkeypatch.setattr(real, "STORED", course / "data" / "real.json")
    monkeypatch.setattr(real, "teach", dict)
    monkeypatch.setattr(sys, "argv", ["real"])
    monkeypatch.delenv("PYTEST_CURRENT_TEST", raising=False)
    write(course / "notebooks" / "01_ask.ipynb", SOURCE.replace("True", "2 < 1", 1))
    real.main()
    assert json.loads((course / "data" / "real.json").read_text())["lessons"][0]["failed"] == []
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "01_ask: 1 of 2 claims hold",
        "  ✗ Most answers are right: 90%",
    ]


# --- Running -------------------------------------------------------------------------------------


@pytest.mark.integration
def test_make_run_stores_the_claims_with_the_outputs(course, monkeypatch, capsys):
    monkeypatch.delenv("PYTEST_CURRENT_TEST", raising=False)
    (course / "work" / "claims.jsonl").unlink()
    lesson = write(course / "notebooks" / "01_ask.ipynb", printed="")
    assert notebooks.run(lesson)
    assert claims.shown(lesson) == {"answers": PRINTED.splitlines()}
    assert [line(row) for row in ledger(course)] == PRINTED.splitlines()
    assert claims.main() == 0  # the same rows stand in work/claims.jsonl

    write(lesson, SOURCE.replace("90%", "95%"))
    assert notebooks.run(lesson)
    assert [row["measured"] for row in ledger(course)] == ["95%", ""]

    write(lesson, SOURCE.replace("True", "False"))
    before = (course / "data" / "claims.json").read_bytes()
    assert not notebooks.run(lesson)
    assert (course / "data" / "claims.json").read_bytes() == before

    monkeypatch.setenv("SFT_MODEL", "somebody/else")  # stores outputs, and leaves the ledger alone
    assert notebooks.run(lesson)
    assert "✗ not so with this model" in lesson.read_text()
    assert (course / "data" / "claims.json").read_bytes() == before


@pytest.mark.integration
def test_all_lessons_can_be_run_first_and_their_outputs_stay(course, monkeypatch, capsys):
    monkeypatch.delenv("PYTEST_CURRENT_TEST", raising=False)
    lesson = write(course / "notebooks" / "01_ask.ipynb", SOURCE.replace("True", "1 > 2", 1))
    before = lesson.read_bytes()
    assert claims.main("--run") == 1
    said = capsys.readouterr()
    assert "01_ask, answers fails: Most answers are right: 90%" in said.err
    write(lesson)
    before = lesson.read_bytes()
    assert claims.main("--run") == 0
    assert lesson.read_bytes() == before and len(ledger(course)) == 2
