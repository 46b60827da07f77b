"""The exercises of lesson NUMBER."""

from __future__ import annotations

from typing import Any

from sftlib.checks.exercise import exercise
from sftlib.checks.reading import whole
from sftlib.checks.verdict import Verdict, right, wrong
from sftlib.data import read_facts


@exercise(NUMBER, 1, "how many rows are held out")
def check_TOPIC(count: Any) -> Verdict:
    found, expected = whole(count), len(read_facts("heldout"))
    if found == len(read_facts("sft")):
        return wrong("That is the training set. What is held out is never trained on.")
    if found != expected:
        return wrong(f"Count the rows of facts['heldout']; found {found}.")
    return right(f"{expected} rows that training never sees.")
