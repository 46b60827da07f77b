"""Predictions: before a cell runs, a student says what will come out; later the outcome is shown.

`predict` shows a question with buttons, or with a field for a number. `outcome` says what came out
beside what was predicted. `checks.progress()` counts how many predictions were right, by lesson.

A choice is kept at once, in `work/predictions.jsonl`; delete that file to start again. Until the
outcome is shown, another choice replaces it. After that the choice made before counts.

Where outputs are stored or compared (see `sftlib.progress_bars`), a prediction is neither asked for
nor kept nor read, and so the outputs do not depend on who has run the lesson.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sftlib import progress_bars
from sftlib.lesson.form import Shown, close, form
from sftlib.lesson.questions import Number, Options, Question

if TYPE_CHECKING:
    from IPython.display import DisplayHandle

KEPT = Path(__file__).parents[2] / "work" / "predictions.jsonl"
COLUMNS = {"lesson": str, "id": str, "predicted": object, "right": bool | None}


class _Lesson:
    """What was asked and shown since a lesson began."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.questions: dict[str, Question] = {}
        self.shown: dict[str, tuple[Shown, DisplayHandle]] = {}
        self.too_late: set[str] = set()  # their outcome was shown, and nothing was predicted


_lesson = _Lesson()
_unwritten: dict[tuple[str, str], dict] = {}  # rows that could not be written


def start(lesson: str) -> None:
    """Forget what was asked, not what was predicted; `begin` calls it."""
    global _lesson
    _lesson = _Lesson(lesson)


def predict(
    id: str,
    question: str,
    *options: str,
    number: str | None = None,
    low: float = -math.inf,
    high: float = math.inf,
) -> None:
    """Ask for a prediction: one of several options, or a number.

        lesson.predict("ask", "What will the model say?", "the right answer", "a wrong answer")
        lesson.predict("score", "Which share will be right?", number="%", low=0, high=100)

    Args:
        id: names the question in its lesson, for `outcome`.
        question: a sentence; code in it may stand in backticks.
        options: two or more answers.
        number: ask for a number in this unit, in place of options; use "" for no unit.
        low: the least number that can be predicted. Without it there is no least one.
        high: the greatest. Without it there is no greatest one.

    Raises:
        ValueError: no lesson has begun, fewer than two options, options together with a number,
            bounds that leave nothing, or an id that another question of the lesson has.
    """
    asked = _question(id, question, options, number, low, high)
    if _lesson.questions.setdefault(id, asked) != asked:
        raise ValueError(
            f"Expected one question with the id {id!r} in a lesson, found another one: "
            f"{_lesson.questions[id].text!r}. Rename one of them. If you have edited the question, "
            "run the set-up cell again."
        )
    from IPython.display import display

    if _somebody_looks():
        shown = _as_form(asked)
        _lesson.shown[id] = shown, display(shown, display_id=True)
    else:
        display(Shown(asked))


def outcome(id: str, value: Any, *, tolerance: float | None = None) -> None:
    """Print what came out, and beside it what was predicted, if something was.

    Args:
        id: that of `predict`.
        value: the number of the option, counted from 1; or the number that came out, in the unit
            of the question.
        tolerance: how far off a predicted number may be and still be right, in the same unit.

    Raises:
        TypeError: `value` is not a number of the kind that the question needs.
        ValueError: nothing was asked with this id, there is no such option, the number is not
            finite, or the tolerance is missing, or not needed.
    """
    if (question := _lesson.questions.get(id)) is None:
        asked = ", ".join(_lesson.questions) or "none yet"
        raise ValueError(
            f"Expected the id of a prediction in this lesson ({asked}), found {id!r}. "
            f"Run the cell with lesson.predict({id!r}, …) first."
        )
    answer = cast(Any, question.answer)
    value = answer.came_out(value, tolerance)
    looked_at = _somebody_looks()
    predicted = _predicted(question) if looked_at else None
    if predicted is None:
        print(f"It was: {answer.said(value).removesuffix('.')}.")
    else:
        right, how_far = answer.judged(predicted, value, tolerance)
        said, link = ("Right", "and") if right else ("Wrong", "but")
        said += f": you predicted {answer.quoted(predicted)}, {link} it was {answer.quoted(value)}"
        print(f"{said} ({how_far})." if how_far else f"{said}.")
        _keep(question, predicted, right)
    if looked_at and predicted is None:
        _lesson.too_late.add(id)
    if looked_at and id in _lesson.shown:
        _replace_form(question)


def tally() -> dict[int, tuple[int, int]]:
    """How many predictions were right, and of how many, by the number of the lesson.

    Counted are those whose outcome was shown.
    """
    right, made = Counter[int](), Counter[int]()
    for (lesson, _), row in _rows().items() if progress_bars() else ():
        number = re.match(r"\d+", lesson)
        if number and row["right"] is not None:
            right[int(number[0])] += row["right"]
            made[int(number[0])] += 1
    return {number: (right[number], made[number]) for number in made}


def _question(
    id: str, text: str, options: tuple[str, ...], unit: str | None, low: float, high: float
) -> Question:
    if not _lesson.name:
        raise ValueError("Expected a lesson, found none. Run the set-up cell (lesson.begin) first.")
    if not id.strip() or not text.strip():
        raise ValueError(f"Expected an id and a question, found {id!r} and {text!r}. Give both.")
    bounded = (low, high) != (-math.inf, math.inf)
    if options and (unit is not None or bounded):
        raise ValueError(
            f"Expected options or a number, found both: {list(options)} and a number. Remove the "
            "options, or number, low and high."
        )
    if unit is None and bounded:
        raise ValueError(
            'Expected a unit beside low and high, found none. Add it, such as number="%"; '
            'number="" has no unit.'
        )
    if unit is not None:
        return Question(_lesson.name, id, _one_line(text), Number(unit, low, high))
    return Question(_lesson.name, id, _one_line(text), Options(tuple(map(_one_line, options))))


def _one_line(text: str) -> str:
    return " ".join(text.split())


# --- What is shown -------------------------------------------------------------------------------


def _somebody_looks() -> bool:
    """Whether a person sees what the cell displays: in a notebook, not captured, not stored."""
    if not progress_bars():
        return False
    from IPython import get_ipython
    from IPython.core.displaypub import CapturingDisplayPublisher

    shell = get_ipython()
    if shell is None or not hasattr(shell, "kernel"):
        return False
    return not isinstance(shell.display_pub, CapturingDisplayPublisher)


def _as_form(question: Question) -> Shown:
    """The question with its form, while a prediction counts; after that without."""

    def choose(answer: Any) -> tuple[Any, str]:
        written = _is_over(question) or _keep(question, answer)
        note = _note(question)
        if not written:
            note += (
                f" Your prediction could not be saved in {KEPT.name}. It is kept only until the "
                "kernel stops."
            )
        return _predicted(question), note

    if _is_over(question):
        return Shown(question, _note(question))
    try:
        return Shown(question, form=form(question, _predicted(question), _note(question), choose))
    except ImportError:  # no ipywidgets: a list is shown
        return Shown(question)


def _replace_form(question: Question) -> None:
    """Show text in place of a form that has done its work: a saved notebook can keep text."""
    shown, handle = _lesson.shown.pop(question.id)
    if shown.form is not None:
        close(shown.form, _note(question))
        handle.update(Shown(question, _note(question)))


def _note(question: Question) -> str:
    """The line below a question: what was predicted, and whether that can be changed."""
    predicted, over, answer = _predicted(question), _is_over(question), cast(Any, question.answer)
    if predicted is None and over:
        return "The outcome was shown first. To predict anew, run the set-up cell again."
    if predicted is None and isinstance(answer, Number):
        return "Predict before you go on: type a number and press Enter."
    if predicted is None:
        return "Predict before you go on."
    if over:
        return f"You predicted {answer.quoted(predicted)}. The outcome was shown: this counts."
    return f"You predict {answer.quoted(predicted)}. You may change it until the outcome is shown."


# --- What is kept --------------------------------------------------------------------------------


def _is_over(question: Question) -> bool:
    """Whether the outcome was shown."""
    if _predicted(question) is None:
        return question.id in _lesson.too_late
    return _rows()[question.lesson, question.id]["right"] is not None


def _predicted(question: Question) -> Any:
    """What was predicted; None if nothing was, or if the question has changed since."""
    predicted = _rows().get((question.lesson, question.id), {}).get("predicted")
    return predicted if question.answer.fits(predicted) else None


def _keep(question: Question, predicted: Any, right: bool | None = None) -> bool:
    """Write a prediction, with its result once it has one; returns whether that worked."""
    from sftlib.data import write_jsonl

    place = question.lesson, question.id
    row = dict(zip(COLUMNS, (*place, predicted, right), strict=True))
    try:
        KEPT.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(KEPT, (_rows() | {place: row}).values())
    except (OSError, ValueError):
        _unwritten[place] = row
        return False
    _unwritten.clear()
    return True


def _rows() -> dict[tuple[str, str], dict]:
    """The kept predictions; `right` is None until the outcome is shown."""
    from sftlib.data.files import read_valid_rows

    found = {}
    with contextlib.suppress(OSError):
        for row in read_valid_rows(KEPT, **COLUMNS):
            found[row["lesson"], row["id"]] = row
    return found | _unwritten
