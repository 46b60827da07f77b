"""What can be predicted: one of several options, or a number; how it is read, said and judged."""

from __future__ import annotations

import contextlib
import math
import operator
import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Options:
    """One of several options, numbered from 1."""

    options: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.options) < 2:
            raise ValueError(
                f"Expected at least two options, found {len(self.options)}. Add one, or ask for a "
                'number: number="%", low=0, high=100.'
            )
        if not all(self.options) or len(set(self.options)) < len(self.options):
            raise ValueError(
                f"Expected options that differ, none of them empty, found {list(self.options)}. "
                "Change or remove one."
            )

    def fits(self, predicted: Any) -> bool:
        """Whether it is one of the options: those of a lesson may change after it was kept."""
        return predicted in self.options

    def came_out(self, value: Any, tolerance: float | None) -> str:
        """The option with the number `value`."""
        if tolerance is not None:
            raise ValueError(f"Expected no tolerance with options, found {tolerance!r}. Drop it.")
        expected = f"Expected the number of an option, 1 to {len(self.options)}, found {value!r}."
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{expected} Give its place in the list as a whole number.")
        if not 1 <= operator.index(value) <= len(self.options):
            raise ValueError(f"{expected} The first option has the number 1.")
        return self.options[operator.index(value) - 1]

    def said(self, value: str) -> str:
        """The option as `outcome` prints it where nothing was predicted."""
        return value

    def quoted(self, value: str) -> str:
        """How a sentence names it."""
        return f'"{value}"'

    def judged(self, predicted: str, value: str, tolerance: float | None) -> tuple[bool, str]:
        """Whether a prediction is right; of options there is nothing more to say."""
        return predicted == value, ""


@dataclass(frozen=True)
class Number:
    """A number with its unit, from `low` to `high`."""

    unit: str = ""
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if not self.low < self.high:  # nor NaN
            raise ValueError(
                f"Expected low < high, found low={self.low}, high={self.high}. Correct one of them."
            )

    def __str__(self) -> str:
        """Which numbers can be predicted."""
        low, high = math.isfinite(self.low), math.isfinite(self.high)
        if low and high:
            return f"a number from {plain(self.low)} to {plain(self.high)} {self.unit}".strip()
        bound = f", at least {plain(self.low)}" * low + f", at most {plain(self.high)}" * high
        return "a number" + f" in {self.unit}" * bool(self.unit) + bound

    def read(self, typed: str) -> float:
        """The number in what a student has typed, with or without its unit and commas (1,000).

        Raises:
            ValueError: there is none, or it is out of range.
        """
        with contextlib.suppress(ValueError):
            text = typed.strip().removesuffix(self.unit).strip()
            if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?", text):  # as `plain` writes it
                text = text.replace(",", "")
            number = float(text)
            if self.fits(number):
                return number
        raise ValueError(
            f"Expected {self}, found {typed.strip()!r}. Write decimals with a point, not a comma."
        )

    def fits(self, predicted: Any) -> bool:
        """Whether it is a number within the bounds."""
        is_number = isinstance(predicted, int | float) and not isinstance(predicted, bool)
        return is_number and math.isfinite(predicted) and self.low <= predicted <= self.high

    def came_out(self, value: Any, tolerance: float | None) -> float:
        """The value as a plain number: of Python, NumPy or torch."""
        if tolerance is None or not 0 <= tolerance < math.inf:
            raise ValueError(
                f"Expected a tolerance from 0, in the unit of the question, found {tolerance!r}. "
                "Give `tolerance`: how far a right prediction may be off."
            )
        if isinstance(value, str | bool) or not hasattr(value, "__float__"):
            raise TypeError(
                f"Expected a number that came out, found {value!r}. Give a number of Python, "
                "NumPy or torch."
            )
        if not math.isfinite(value):
            raise ValueError(
                f"Expected a finite number that came out, found {value}. Look for its cause."
            )
        return float(value)

    def said(self, value: float) -> str:
        """The number with its unit."""
        return f"{plain(value)} {self.unit}".strip()

    quoted = said

    def judged(self, predicted: float, value: float, tolerance: float) -> tuple[bool, str]:
        """Whether a prediction is right, and how far off it may be or is."""
        unit = "percentage points" if self.unit == "%" else self.unit
        allowed = f"{plain(tolerance)} {unit}".strip()
        off = abs(predicted - value)
        # 97.3 - 87.3 is a little more than 10
        if off <= tolerance or math.isclose(off, tolerance, rel_tol=1e-9):
            return True, f"within {allowed}"
        return False, f"more than {allowed} off"


@dataclass(frozen=True)
class Question:
    """What a student is asked before a cell runs."""

    lesson: str  # empty where no lesson has begun
    id: str
    text: str
    answer: Options | Number

    def lines(self) -> list[str]:
        """The question, then a line for each answer."""
        if isinstance(self.answer, Number):
            return [self.text, f"(Predict {self.answer}.)"]
        return [self.text, *(f"{i}. {option}" for i, option in enumerate(self.answer.options, 1))]

    def markdown(self) -> str:
        text, *answers = self.lines()
        return "\n".join([f"**{escaped(text)}**", "", *map(escaped, answers)])


def plain(number: float) -> str:
    """A number as people write it: 97.3, 1,000, 0.0002."""
    return f"{number:,.0f}" if abs(number) >= 1000 or number == int(number) else f"{number:.4g}"


def escaped(text: str) -> str:
    """Text as Markdown that shows it as it is; code in backticks stays code."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([\\*_<>$\[\]|~#])", r"\\\1", part)
        for part in parts
    )
