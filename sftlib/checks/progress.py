"""Which exercises are solved: each check notes it, and `progress()` shows it."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from sftlib import progress_bars
from sftlib.checks.verdict import Verdict

if TYPE_CHECKING:
    import pandas as pd

SOLVED = Path(__file__).parents[2] / "work" / "progress.jsonl"
EXERCISES: dict[tuple[int, int], str] = {}  # lesson and number of each exercise: what it asks for


def exercise(check: Callable[..., Verdict]) -> Callable[..., Verdict]:
    """A check that notes when it is passed; its docstring begins with `Lesson 1, exercise 2: …`."""
    found = re.match(r"Lesson (\d+), exercise (\d+): (.+)", check.__doc__ or "")
    if not found:
        raise ValueError(
            f"Expected a docstring of {check.__name__} that begins with 'Lesson 1, exercise 2: …', "
            f"found {check.__doc__!r}."
        )
    lesson, number, task = found.groups()
    EXERCISES[int(lesson), int(number)] = task.rstrip(".")

    @functools.wraps(check)
    def noting(*args, **options) -> Verdict:
        verdict = check(*args, **options)
        if verdict and progress_bars():  # somebody is there; neither a test nor a recording
            with contextlib.suppress(OSError, ValueError):  # a note is not worth an error
                _note(int(lesson), int(number))
        return verdict

    return noting


def _note(lesson: int, number: int) -> None:
    from sftlib.data import write_jsonl

    solved = _solved()
    if (lesson, number) not in solved:
        solved[lesson, number] = date.today().isoformat()
        SOLVED.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"lesson": a, "exercise": b, "on": day} for (a, b), day in sorted(solved.items())]
        write_jsonl(SOLVED, rows)


def _solved() -> dict[tuple[int, int], str]:
    """The day of each solved exercise; a damaged line is left out."""
    found = {}
    for line in SOLVED.read_text(encoding="utf-8").splitlines() if SOLVED.exists() else ():
        with contextlib.suppress(ValueError, LookupError, TypeError):
            row = json.loads(line)
            found[row["lesson"], row["exercise"]] = row["on"]
    return found


def progress() -> pd.DataFrame:
    """What you have solved, a row a lesson, and the next open exercise of each.

    It is kept in `work/progress.jsonl`; remove that file to begin anew.
    """
    import pandas as pd

    solved, rows = _solved(), {}
    for lesson in sorted({lesson for lesson, _ in EXERCISES}):
        numbers = sorted(number for one, number in EXERCISES if one == lesson)
        left = [number for number in numbers if (lesson, number) not in solved]
        rows[f"lesson {lesson}"] = {
            "solved": " ".join("○" if number in left else "✓" for number in numbers),
            "next": f"{left[0]}: {EXERCISES[lesson, left[0]]}" if left else "all done",
        }
    return pd.DataFrame.from_dict(rows, orient="index")
