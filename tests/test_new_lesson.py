"""`make new-lesson` writes a lesson that runs, and that obeys the rules, from its first minute."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from sftlib.lesson.claims import read_ledger

import nbformat
import pytest

from tests import notebook_rules as rules
from tests.test_pages import SAID
from tools import claims, copies, notebooks
from tools.new_lesson import main, new_lesson, with_check

ROOT = Path(__file__).parents[1]
INIT = (ROOT / "sftlib/checks/__init__.py").read_text(encoding="utf-8")


@pytest.fixture
def course(tmp_path: Path) -> Path:
    """A copy of what a new lesson touches, and links to what it uses."""
    return copies.course(tmp_path, "notebooks", "sftlib", "tests")


def test_the_title_and_the_names_stand_where_they_belong(course: Path):
    lesson, solutions, checks, attacks, known = new_lesson(
        "10_big_data", 'The "big" \\ one', course
    )
    first = json.loads(lesson.read_text())["cells"][0]["source"][0]
    assert first == '# Lesson 10: The "big" \\ one\n'
    takes = re.search(r"\*\*Takes\*\* (.+?) of computing on two CPU cores", lesson.read_text())
    assert takes and takes[1] in SAID
    assert 'lesson.begin("10_big_data")' in lesson.read_text().replace('\\"', '"')
    assert "check_big_data" in solutions.read_text() and "def check_big_data" in checks.read_text()
    assert "@exercise(10, 1, " in checks.read_text()
    assert attacks == course / "tests/attacks/lesson_10.py"
    for path in (lesson, solutions, checks, attacks):
        assert not {"NUMBER", "TITLE", "STEM", "TOPIC"} & set(path.read_text().split())
    assert "from sftlib.checks.big_data import check_big_data" in known.read_text()


def test_the_check_is_listed_in_its_place():
    new = with_check(INIT, "gguf")
    added = [line for line in new.splitlines() if line not in INIT.splitlines()]
    assert added == ["from sftlib.checks.gguf import check_gguf", '    "check_gguf",']
    names = [line for line in new.splitlines() if line.startswith('    "')]
    assert names == sorted(names)


@pytest.mark.parametrize(
    ("name", "title", "expected"),
    [
        ("", "A title", "two digits"),
        ("9_x", "A title", "two digits"),
        ("10_Big", "A title", "small letters"),
        ("10_../x", "A title", "small letters"),
        ("10_big", "  ", "Expected a TITLE"),
        ("09_big", "A title", "09_llama3.ipynb there"),
        ("10_metrics", "A title", "metrics.py there"),
    ],
)
def test_bad_names_are_refused_and_nothing_is_written(course: Path, name, title, expected):
    before = sorted(course.rglob("*"))
    with pytest.raises(ValueError, match=expected):
        new_lesson(name, title, course)
    assert sorted(course.rglob("*")) == before


def test_the_command_says_what_is_wrong(capsys):
    assert main("x", "y") == 1
    assert "make new-lesson NAME=10_quantisation" in capsys.readouterr().err


@pytest.mark.integration
def test_a_new_lesson_runs_and_obeys_the_rules(course: Path):
    written = new_lesson("10_counting", "Counting", course)
    settings = os.environ | {"PYTHONPATH": str(course), "SFT_NO_BARS": "1"}
    settings.pop("PYTEST_CURRENT_TEST", None)
    for path in written[:2]:
        store = [f"--output-dir={path.parent}", str(path)]
        subprocess.run([*notebooks.NBCONVERT, *store], env=settings, check=True)
        assert notebooks.clean([path]) == 0
        nb = nbformat.read(path, 4)
        every = rules.RULES + rules.CLAIM_RULES
        problems = {rule.__name__: rule(nb, path) for rule in every}
        assert not {name: found for name, found in problems.items() if found}
    claimed = read_ledger(course / "work" / "claims.jsonl")
    assert claimed and claims.problems(written[0], claimed) == []
    style = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml")]
    subprocess.run([*style, *map(str, written)], check=True)
    tried = [sys.executable, "-m", "pytest", "-q", "tests/test_attacks.py", "-k", "counting"]
    done = subprocess.run(tried, cwd=course, env=settings, capture_output=True, text=True)
    assert done.returncode == 0 and "29 passed" in done.stdout, done.stdout
