"""Answers to the exercises, right and wrong, each with what its verdict must say.

`tests/test_attacks.py` gives all of them to the checks. A wrong answer that is accepted is a defect
of the check, and so is a right one that is refused.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class Made:
    """An answer that can be used once only, such as a generator: it is made anew for each check."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make


class Slow:
    """An answer that is trained on for many seconds, as others of its kind are: it runs nightly."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer


@dataclass
class Attacks:
    """The answers to one exercise.

    Attributes:
        check: the exercise's.
        right: right answers, among them unusual ones.
        wrong: wrong answers, each with words that the hint must have.
        untouched: answers that are open, wholly or in part.
        arguments: makes of an answer the arguments of the check.
        trains: the check trains, so each answer takes seconds.
    """

    check: Callable
    right: list
    wrong: list[tuple[Any, str]]
    untouched: list = field(default_factory=lambda: [...])
    arguments: Callable[[Any], tuple] = lambda answer: (answer,)
    trains: bool = False

    def verdict(self, answer: Any, **options: Any) -> Any:
        """What the check says."""
        answer = answer.answer if isinstance(answer, Slow) else answer
        made = answer.make() if isinstance(answer, Made) else answer
        return self.check(*self.arguments(made), **options)


def raises(error: BaseException) -> None:
    """For a lambda, which cannot hold `raise`."""
    raise error
