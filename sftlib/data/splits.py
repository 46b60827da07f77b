"""Split rows into those to train on and those held out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate


def split(
    rows: Sequence[dict],
    by: str | Callable[[dict], object],
    held_out: float = 0.1,
    seed: int = 0,
) -> tuple[list[dict], list[dict]]:
    """Rows to train on and rows held out; all rows with the same value are on the same side.

    The split depends on the values, how often each occurs and the seed, not on the order of the
    rows: values are held out in the order of a hash, at least one, until the share is as near as
    possible to `held_out`. A value with more than twice the rows that shall be held out stays on
    the other side, unless all have more: then the rarest is held out. Both sides keep the order of
    the rows.

    Args:
        by: a key of the rows (`"entity"`), or a function that gives each row's value. Two values
            are the same if their `repr` is.
        held_out: the share of rows to hold out.

    Raises:
        ValueError: a row lacks the key, the share is not between 0 and 1, or all rows have the same
            value, so that one side would be empty.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"Expected a share between 0 and 1 to hold out, found {held_out!r}.")
    values = [
        repr(by(row)) if callable(by) else _value(n, row, by) for n, row in enumerate(rows, 1)
    ]
    counts = Counter(values)
    if len(counts) < 2:
        raise ValueError(
            f"Expected at least two values of {by!r} to split by, found {len(counts)} in "
            f"{len(rows)} rows: one side would be empty. Split by another key."
        )
    order = sorted(counts, key=lambda v: hashlib.sha256(f"{seed} {v}".encode()).digest())
    wanted = held_out * len(rows)
    most = max(2 * wanted, min(counts.values()))
    # Not the last value of all: something must be left to train on.
    order = [value for value in order if counts[value] <= most][: len(counts) - 1]
    sizes = list(accumulate(counts[value] for value in order))
    nearest = min(range(len(sizes)), key=lambda i: abs(sizes[i] - wanted))
    chosen = set(order[: nearest + 1])
    sides: tuple[list[dict], list[dict]] = ([], [])
    for row, value in zip(rows, values, strict=True):
        sides[value in chosen].append(row)
    return sides


def _value(number: int, row: dict, key: str) -> str:
    if key not in row:
        raise ValueError(
            f"Row {number}: expected the key {key!r} to split by, found {', '.join(map(str, row))}."
        )
    return repr(row[key])
