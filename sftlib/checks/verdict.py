"""Verdicts, and how a check ends early with one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """What a check says about an answer. `passed` is None if it could not be judged."""

    passed: bool | None
    message: str

    def __repr__(self) -> str:
        return {True: "✓ ", False: "✗ ", None: "○ "}[self.passed] + self.message

    def __bool__(self) -> bool:
        return bool(self.passed)


NOT_ATTEMPTED = Verdict(None, "Not attempted yet: replace the `...` with your answer.")


def right(message: str) -> Verdict:
    return Verdict(True, message)


def wrong(message: str) -> Verdict:
    return Verdict(False, message)


def still_open(places: list[str]) -> Verdict:
    """The verdict on an answer of which some parts are still `...`."""
    return Verdict(None, f"Still open: {'; '.join(places)}. Replace each `...` with your answer.")


class CheckEnds(Exception):
    """Raised inside a check that cannot continue; the frame then returns the verdict."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict


# --- Not yet in the frame ---


def untouched(answer: Any) -> bool:
    """Whether an answer is still the lesson's `...` (or None), or a collection of only these."""
    if isinstance(answer, dict):
        answer = list(answer.values())
    if isinstance(answer, list | tuple) and answer:
        return all(map(untouched, answer))
    return answer is ... or answer is None


def result_of(function: Callable, *args: Any, context: str = "") -> Any:
    """What a student's function returns. If it returns `...` or raises an error, the check ends.

    Args:
        context: written before the message, for instance "At step 3: ".
    """
    result = call(function, *args)
    if untouched(result):
        raise CheckEnds(NOT_ATTEMPTED)
    if isinstance(result, Exception):
        error = f"{type(result).__name__}: {result}"
        raise CheckEnds(wrong(f"{context}Your function raised {error}"))
    return result


def likely_cause(
    found: float, causes: Mapping[int, str] | Mapping[float, str], tolerance: float
) -> str:
    """Why a student found this number: the cause of the first value near it; empty without any.

    Args:
        causes: a wrong result → what leads to it.
        tolerance: as a share of the value.
    """
    near = (cause for value, cause in causes.items() if abs(found / value - 1) < tolerance)
    return next(near, "")


def call(function: Callable, *args: Any) -> Any:
    """What a student's function returns, or the exception that it raises."""
    try:
        return function(*args)
    except Exception as error:
        return error
