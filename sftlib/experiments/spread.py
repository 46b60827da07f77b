"""Spread: one setting run with several seeds, and whether two settings differ by more than that.

One run says little: by the seed alone, two systems of named-entity recognition moved by a point of
F1, between the state of the art and mediocre (Reimers and Gurevych 2017,
https://aclanthology.org/D17-1035).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, overload

from sftlib import progress_bar

if TYPE_CHECKING:
    import pandas

ENOUGH = 3  # seeds: the ranges of two settings with two each are apart by chance one time in three


@dataclass(frozen=True, init=False)
class Spread:
    """What one setting gave with several seeds: `str` says mean, range and count.

    `f"{spread:.1%}"` formats each of its numbers. Without a format, the mean has three digits.
    `100 * spread` turns shares into per cent. A column of a table may hold spreads:
    `runs.groupby("r").dev.agg(Spread)`.

    Args:
        values: one number per seed, all in the same unit.

    Raises:
        ValueError: there is no value, or one is NaN or infinite.
    """

    values: tuple[float, ...]

    def __init__(self, values: Iterable[float]) -> None:
        found = tuple(map(float, values))
        if not found or not all(map(math.isfinite, found)):
            raise ValueError(
                f"Expected a finite number for each seed, found {[*found]}. If a run diverged, "
                "report how many did, or a measure that it still has, such as exact match."
            )
        object.__setattr__(self, "values", found)  # the dataclass is frozen

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def least(self) -> float:
        return min(self.values)

    @property
    def greatest(self) -> float:
        return max(self.values)

    @property
    def count(self) -> int:
        """How many seeds there are."""
        return len(self.values)

    def __rmul__(self, factor: float) -> Spread:
        return Spread(factor * value for value in self.values)

    __mul__ = __rmul__

    def __format__(self, spec: str) -> str:
        if not spec:
            size = fmean(map(abs, self.values))
            spec = f".{max(0, 2 - math.floor(math.log10(size))) if size else 0}f"
        mean, least, greatest = (format(x, spec) for x in (self.mean, self.least, self.greatest))
        if self.count == 1:
            return f"{mean} (1 seed)"
        return f"{mean} ({least} to {greatest}, {self.count} seeds)"

    def __str__(self) -> str:
        return format(self)

    def beyond(self, other: Spread | float) -> bool:
        """Whether two settings differ by more than their seeds do: their ranges do not overlap.

        For a direction, compare `a.least > b.greatest`. A number stands for what no seed changes,
        such as the base model's score.

        What it is: the most extreme result of the rank test of Mann and Whitney (1947,
        https://doi.org/10.1214/aoms/1177730491), the only one that three seeds can notice.

        What it is not: proof. If two settings are equal, the ranges of three seeds each are apart
        in 2 of the 20 orders of their values, so by chance one time in ten. With four seeds it is
        2 of the 70, with five 2 of the 252. Against a number that is the setting's own median it is
        one time in four. Expect one such accident in ten comparisons.

        Nor do ranges that overlap show that two settings are equal. If scores are normally
        distributed and their means differ by one standard deviation, three seeds show it in one
        comparison of four. Colas et al. (2018, arXiv 1806.08295) say how many seeds a difference
        needs. And a seed changes only what it draws, such as the order of examples: other test
        questions would add a spread of their own.

        Raises:
            ValueError: one of them has fewer than three seeds.
        """
        rival = other if isinstance(other, Spread) else Spread([other] * ENOUGH)
        if min(self.count, rival.count) < ENOUGH:
            raise ValueError(
                f"Expected at least {ENOUGH} seeds of each, found {min(self.count, rival.count)}. "
                "Run more: sftlib.experiments.over_seeds(measure, range(3))."
            )
        return self.least > rival.greatest or rival.least > self.greatest


@overload
def over_seeds(measure: Callable[[int], float], seeds: Iterable[int] = ...) -> Spread: ...
@overload
def over_seeds(
    measure: Callable[[int], Mapping[str, float] | pandas.Series], seeds: Iterable[int] = ...
) -> dict[str, Spread]: ...
def over_seeds(
    measure: Callable[[int], Any], seeds: Iterable[int] = range(ENOUGH)
) -> Spread | dict[str, Spread]:
    """Run one setting with each seed, with a progress bar.

    Args:
        measure: trains with the seed that it is given, and returns a number, or several by name (a
            mapping, or a pandas Series such as `evaluate.report(…).exact_match`). It must use the
            seed: otherwise all values are equal, and every difference looks clear.
        seeds: different integers.

    Returns:
        A `Spread`, or one for each name.

    Raises:
        ValueError: there is no seed, or one seed twice.
    """
    seeds = list(seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"Expected at least one seed and only different seeds, found {seeds}. "
            "Give for instance seeds=range(3)."
        )
    found = [measure(seed) for seed in progress_bar(seeds, unit="seed")]
    if not hasattr(found[0], "keys"):
        return Spread(found)
    return {name: Spread(one[name] for one in found) for name in found[0].keys()}  # noqa: SIM118
