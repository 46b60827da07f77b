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
