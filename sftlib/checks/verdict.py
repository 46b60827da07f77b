"""What a check says about an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """What a check found: `passed` is True, False, or None for "not attempted"."""

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


def call(function: Callable, *args: Any) -> Any:
    try:
        return function(*args)
    except Exception as error:
        return error
