"""Verdicts, and how a check ends early with one."""

from __future__ import annotations

from dataclasses import dataclass


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
    """The verdict on a right answer: it passes, and the message adds something to it."""
    return Verdict(True, message)


def wrong(message: str) -> Verdict:
    """The verdict on a wrong answer: the message says what is probably wrong."""
    return Verdict(False, message)


def still_open(places: list[str]) -> Verdict:
    """The verdict on an answer of which some parts are still `...`."""
    return Verdict(None, f"Still open: {'; '.join(places)}. Write your answer there.")


def is_none(places: list[str]) -> Verdict:
    """The verdict on an answer that is None, or holds None at these places, and no `...`."""
    named = [place for place in places if place]  # the whole answer has no name
    found = f"None in your answer: {'; '.join(named)}" if named else "Your answer is None"
    return Verdict(
        None,
        f"{found}. Did you forget `return`? `print` and methods such as `sort` return None, too.",
    )


class CheckEnds(Exception):
    """Raised inside a check that cannot continue; `@exercise` then returns the verdict."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict
