"""Why a student found this number: a known mistake, or another unit."""

from __future__ import annotations

from collections.abc import Mapping

UNITS: dict[str, dict[float, str]] = {
    "share": {
        100: "that is percent. Give the share, a number from 0 to 1.",
    },
    "gigabytes": {
        1e9 / 2**30: "that is GiB, 2³⁰ bytes each. Give GB, 10⁹ bytes each.",
        1e9: "that is bytes. Give GB, 10⁹ bytes each.",
        1e9 / 2**20: "that is MiB, 2²⁰ bytes each. Give GB, 10⁹ bytes each.",
        1e3: "that is MB, 10⁶ bytes each. Give GB, 10⁹ bytes each.",
        1e-3: "that is TB, 10¹² bytes each. Give GB, 10⁹ bytes each.",
        8: "that is gigabits. A byte has 8 bits.",
    },
    "money": {
        100: "that is in cents. The prices are in whole units.",
    },
}
"""For each unit of a right answer, the usual wrong ones.

A factor stands for each wrong unit: a student who used that unit gives the right number times this
factor. Its value is the hint. In percent, for example, a share is 100 times as large.
"""


def near(found: float, expected: float, tolerance: float) -> bool:
    """Whether a number differs from another by at most this share of the other."""
    return abs(found - expected) <= tolerance * abs(expected)


def likely_cause(
    found: float,
    expected: float,
    causes: Mapping[float, str] | Mapping[int, str] | None = None,
    unit: str = "",
    tolerance: float = 0.005,
) -> str:
    """The hint of the wrong result that lies nearest to the found one; empty if none is near.

    Args:
        expected: the right number.
        causes: a wrong result → what leads to it.
        unit: in which the right number is, a key of `UNITS`.
        tolerance: as a share of the wrong result.
    """
    wrong_results = {expected * factor: hint for factor, hint in UNITS.get(unit, {}).items()}
    wrong_results |= {float(result): hint for result, hint in (causes or {}).items()}
    by_distance = sorted(wrong_results, key=lambda result: abs(found - result) / abs(result))
    nearest = next((r for r in by_distance if near(found, r, tolerance)), None)
    return "" if nearest is None else wrong_results[nearest]
