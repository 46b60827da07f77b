"""The exercises of lesson NUMBER."""

from __future__ import annotations

from typing import Any

from sftlib.checks.exercise import exercise
from sftlib.checks.verdict import Verdict, right, wrong
from sftlib.data import read_facts


@exercise(NUMBER, 1, "how many rows are held out")
def check_TOPIC(count: Any) -> Verdict:
    if isinstance(count, bool) or not isinstance(count, int):
        return wrong(f"Expected a whole number, found {count!r}.")
    if count == len(read_facts("sft")):
        return wrong("That is the training set. What is held out is never trained on.")
    expected = len(read_facts("heldout"))
    if count != expected:
        return wrong(f"Count the rows of facts['heldout']; found {count}.")
    return right(f"{expected} rows that training never sees.")
