"""Which exercises are solved: each right answer is noted, and `progress()` shows it."""

from __future__ import annotations

import contextlib
import itertools
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from sftlib import progress_bars
from sftlib.data.files import read_valid_rows, write_jsonl

if TYPE_CHECKING:
    import pandas as pd

SOLVED = Path(__file__).parents[2] / "work" / "progress.jsonl"
EXERCISES: dict[tuple[int, int], str] = {}  # (lesson, number) → what the exercise asks for


def enter(lesson: int, number: int, task: str) -> None:
    """Make an exercise known."""
    EXERCISES[lesson, number] = task


def note(lesson: int, number: int) -> None:
    """Record that an exercise is solved; nothing is recorded in tests and stored notebooks."""
    if progress_bars():  # a person works here
        with contextlib.suppress(OSError, ValueError):  # the record may fail, not the check
            _record(lesson, number)


def _record(lesson: int, number: int) -> None:
    solved = _solved()
    if (lesson, number) not in solved:
        solved[lesson, number] = date.today().isoformat()
        SOLVED.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"lesson": n, "exercise": m, "on": day} for (n, m), day in sorted(solved.items())]
        write_jsonl(SOLVED, rows)


def _solved() -> dict[tuple[int, int], str]:
    """The day on which each exercise was solved."""
    rows = read_valid_rows(SOLVED, lesson=int, exercise=int, on=str)
    return {(row["lesson"], row["exercise"]): row["on"] for row in rows}


def progress() -> pd.DataFrame:
    """What you have solved: one row per lesson, with its next open exercise.

    With the first prediction that is judged there is a column for predictions. The records are
    `work/progress.jsonl` and `work/predictions.jsonl`; delete them to start again.
    """
    from sftlib.lesson.predictions import tally

    import pandas as pd

    solved, rows = _solved(), {}
    for lesson, group in itertools.groupby(sorted(EXERCISES), key=lambda place: place[0]):
        numbers = [number for _, number in group]
        left = [number for number in numbers if (lesson, number) not in solved]
        rows[f"lesson {lesson}"] = {
            "solved": " ".join("○" if number in left else "✓" for number in numbers),
            "next": f"{left[0]}: {EXERCISES[lesson, left[0]]}" if left else "all done",
        }
    table = pd.DataFrame.from_dict(rows, orient="index")
    if judged := {
        f"lesson {n}": f"{right} of {made} right" for n, (right, made) in tally().items()
    }:
        table["predictions"] = [judged.get(lesson, "") for lesson in table.index]
    return table
