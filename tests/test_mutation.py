"""A damage changes one thing at a time; of those stored, nine of ten were noticed."""

import ast
import json

import pytest

from tools import copies, mutation
from tools.mutation import COPIED, SCRIPT, STORED, damages, draw

SOURCE = '''"""A module."""
LIMIT = 3


def f(rows, sign=True):
    """Doc."""
    if not rows and len(rows) < LIMIT:
        raise ValueError("none")
    return rows["é"][-1] + 0.5, f"{1 + 1}"
'''


def test_each_damage_changes_one_expression_and_leaves_python(tmp_path):
    (tmp_path / "m.py").write_text(SOURCE, encoding="utf-8")
    found = list(damages(tmp_path / "m.py", tmp_path))
    changed = {damage.lines(SOURCE)[1] for damage in found}
    assert changed == {
        "LIMIT = 4",
        "def f(rows, sign=False):",
        "if rows and len(rows) < LIMIT:",
        "if not rows or len(rows) < LIMIT:",
        "if not rows and len(rows) <= LIMIT:",
        "pass",
        """return rows['éx'][-1] + 0.5, f"{1 + 1}\"""",
        """return rows["é"][1] + 0.5, f"{1 + 1}\"""",
        """return rows["é"][-2] + 0.5, f"{1 + 1}\"""",
        """return rows["é"][-1] - 0.5, f"{1 + 1}\"""",
        """return rows["é"][-1] + 1.0, f"{1 + 1}\"""",
    }
    assert all(ast.parse(damage.apply(SOURCE)) for damage in found)


def test_every_file_has_its_turn_before_one_has_a_second(tmp_path):
    (tmp_path / "sftlib").mkdir()
    for name, text in {
        "sftlib/a.py": "x = 1\ny = 2\nz = not x\n",
        "sftlib/b.py": "x = 1 + 1\n",
        "sftlib/__init__.py": "x = 1",
        SCRIPT: "x = 1",
    }.items():
        (tmp_path / name).write_text(text)
    drawn = draw(tmp_path, 6, seed=0)
    assert {damage.file for damage in drawn[:3]} == {"sftlib/a.py", "sftlib/b.py", SCRIPT}
    assert drawn == draw(tmp_path, 6, seed=0) and len(set(drawn)) == 6


@pytest.mark.integration
def test_what_is_damaged_is_a_copy_and_is_tested(tmp_path):
    copy = copies.course(tmp_path, *COPIED)
    files = {damage.file for damage in draw(copy, 100, seed=0)}
    assert {SCRIPT, "sftlib/chat/encoding.py"} < files
    assert all((copy / file).resolve() == copy / file for file in files)
    assert mutation.tests_of(SCRIPT)[0] == "tests/test_llama3.py"
    assert mutation.tests_of("sftlib/chat/encoding.py")[0] == "tests/test_chat.py"
    assert "tests/test_data.py" in mutation.tests_of("sftlib/data/hygiene.py")  # data imports it
    assert "tests/test_logs.py" in mutation.tests_of("sftlib/experiments/logs.py")


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    (tmp_path / "sftlib").mkdir()
    (tmp_path / "sftlib" / "a.py").write_text("x = 1\ny = 2\nz = 3\n")
    (tmp_path / SCRIPT).write_text("")
    monkeypatch.setattr(mutation.copies, "course", lambda *_: tmp_path)
    monkeypatch.setattr(mutation, "KEPT", tmp_path / "work" / "kept.jsonl")
    monkeypatch.setattr(mutation.sys, "argv", ["mutation", "--count=3", "--passed"])
    monkeypatch.setattr(mutation, "tests_of", lambda _: [])
    tried = []

    def noticed(damage, _):
        if len(tried) == 2:
            tried.append(None)
            raise KeyboardInterrupt
        tried.append(damage)
        return "" if len(tried) == 1 else "a test"

    monkeypatch.setattr(mutation, "noticed", noticed)
    with pytest.raises(KeyboardInterrupt):
        mutation.main()
    assert len(mutation.KEPT.read_text().splitlines()) == 2
    assert mutation.main() == 1, "two of three are fewer than nine of ten"
    assert len(set(tried) - {None}) == 3 == len(tried) - 1, "one was tried twice"
    assert "2 of 3 noticed (67%), 0 harmless, 1 missed" in capsys.readouterr().out
    assert not mutation.KEPT.exists()


def test_nine_of_ten_stored_damages_were_noticed_and_the_rest_have_a_reason():
    rows = json.loads(STORED.read_text(encoding="utf-8"))["damages"]
    missed = [row for row in rows if not row["noticed"]]
    assert len(rows) >= 60 and len(missed) <= 0.1 * len(rows)
    assert not [row for row in missed if not row["by"]]
