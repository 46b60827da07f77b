"""A damage changes one thing at a time; of those stored, nine of ten were noticed."""

import ast
import json

from tests.mutation import STORED, damages, draw

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
        "a": "x = 1\ny = 2\nz = not x\n",
        "b": "x = 1 + 1\n",
        "__init__": "x = 1",
    }.items():
        (tmp_path / "sftlib" / f"{name}.py").write_text(text)
    drawn = draw(tmp_path, 5, seed=0)
    assert {damage.file for damage in drawn[:2]} == {"sftlib/a.py", "sftlib/b.py"}
    assert drawn == draw(tmp_path, 5, seed=0) and len(set(drawn)) == 5


def test_nine_of_ten_stored_damages_were_noticed_and_the_rest_have_a_reason():
    rows = json.loads(STORED.read_text(encoding="utf-8"))["damages"]
    missed = [row for row in rows if not row["noticed"]]
    assert len(rows) >= 60 and len(missed) <= 0.1 * len(rows)
    assert not [row for row in missed if not row["by"]]
