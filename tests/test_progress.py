"""Progress: bars on long work, and which exercises are solved."""

import sys
from pathlib import Path

from sftlib import checks, progress_bar
from sftlib.checks.exercise import exercise
from sftlib.checks.progress import EXERCISES, progress
from sftlib.checks.verdict import right, wrong
from sftlib.lesson import predictions

import pytest

module = sys.modules["sftlib.checks.progress"]  # its function has the same name


@pytest.fixture
def solved(tmp_path, monkeypatch):
    """The file of solved exercises, in a folder that is not there yet."""
    monkeypatch.setattr(module, "SOLVED", tmp_path / "work" / "progress.jsonl")
    monkeypatch.setattr(predictions, "KEPT", tmp_path / "work" / "predictions.jsonl")
    return module.SOLVED


@pytest.fixture
def two(monkeypatch):
    """Two exercises of one lesson, whose answers pass where they are right."""
    monkeypatch.setattr(module, "EXERCISES", {})

    def check(number):
        @exercise(1, number, f"find the number {number}")
        def check_it(answer):
            return right("Yes.") if answer == number else wrong("No.")

        return check_it

    return check(1), check(2)


def test_the_exercises_of_each_lesson_are_numbered_from_one_in_their_order():
    numbers: dict[int, list[int]] = {}
    for lesson, number in EXERCISES:
        numbers.setdefault(lesson, []).append(number)
    for lesson, found in numbers.items():
        assert found == [*range(1, len(found) + 1)], lesson
    assert len(numbers) >= 9


# --- Bars ----------------------------------------------------------------------------------------


def test_a_bar_is_shown_to_people_and_goes_when_the_work_is_done(somebody_comes, capsys):
    somebody_comes()
    assert list(progress_bar(range(3), unit="step")) == [0, 1, 2]
    shown = capsys.readouterr().out
    assert "0/3" in shown and "step/s" in shown and shown.endswith("\r")


@pytest.mark.parametrize("name", ["CI", "PYTEST_CURRENT_TEST", "SFT_NO_BARS"])
def test_no_bar_where_outputs_are_compared_or_stored(name, somebody_comes, monkeypatch, capsys):
    somebody_comes()
    monkeypatch.setenv(name, "1")
    assert list(progress_bar(range(3))) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


# --- Exercises -----------------------------------------------------------------------------------


def test_it_is_kept_beside_the_lessons_in_the_folder_that_git_ignores():
    kept = Path(__file__).parents[1] / "work" / "progress.jsonl"
    assert kept == module.SOLVED


def test_what_passes_is_noted_and_shown(two, solved, somebody_comes):
    somebody_comes()
    first, second = two
    assert list(progress().solved) == ["○ ○"]
    assert progress().loc["lesson 1", "next"] == "1: find the number 1"
    assert not first(7) and not second(...) and not solved.exists()
    assert first(1)
    assert list(progress().solved) == ["✓ ○"]
    assert progress().loc["lesson 1", "next"] == "2: find the number 2"
    assert second(2)
    assert progress().loc["lesson 1"].tolist() == ["✓ ✓", "all done"]


def test_an_exercise_is_noted_once_and_stays_solved(two, solved, somebody_comes):
    somebody_comes()
    first, _ = two
    first(1)
    before = solved.read_bytes()
    first(1)
    first(7)
    assert solved.read_bytes() == before and before.count(b"\n") == 1


def test_runs_without_a_reader_note_nothing(two, solved):
    assert two[0](1) and not solved.exists()  # pytest sets its variable


def test_a_note_that_cannot_be_written_is_no_error(two, solved, somebody_comes):
    somebody_comes()
    solved.parent.write_text("a file where the folder should be")
    assert two[0](1)
    assert not solved.exists()


@pytest.mark.parametrize(
    "line",
    [
        '{"lesson": 1, "exerc',
        '{"lesson": 1, "exercise": 2, "on": "\udcc3',  # ends within a character
        "[]",
        "[" * 100_000,
        '{"lesson": 1, "exercise": 2}',
        '{"lesson": [1], "exercise": 2, "on": "2026-10-01"}',
        '{"lesson": "one", "exercise": 2, "on": "2026-10-01"}',
        '{"lesson": 1, "exercise": 2, "on": NaN}',
        '{"lesson": 1, "exercise": 2, "on": "\\ud800"}',
    ],
)
def test_a_damaged_line_costs_no_other(line, two, solved, somebody_comes):
    somebody_comes()
    two[0](1)
    with solved.open("a", errors="surrogateescape") as file:
        file.write(line)
    assert list(progress().solved) == ["✓ ○"]
    assert two[1](2) and list(progress().solved) == ["✓ ✓"]


def test_help_on_a_check_names_its_lesson(two):
    assert two[1].__doc__ == "Lesson 1, exercise 2: find the number 2."


def test_each_check_of_the_lessons_has_its_place():
    named = [name for name in checks.__all__ if name.startswith("check_")]
    assert len(EXERCISES) == len(named)
    lessons = {lesson for lesson, _ in EXERCISES}
    assert lessons == set(range(1, 10))
    for lesson in lessons:
        numbers = sorted(number for one, number in EXERCISES if one == lesson)
        assert numbers == list(range(1, len(numbers) + 1))
