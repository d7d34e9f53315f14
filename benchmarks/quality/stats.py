"""Means and paired differences over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student


@dataclass(frozen=True)
class Interval:
    """A mean with half the width of its 95 % interval (Student's t); NaN for one value only."""

    mean: float
    half: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        return self.half < abs(self.mean)

    def text(self, digits: int, *, signed: bool = False) -> str:
        mean = f"{self.mean:+.{digits}f}" if signed else f"{self.mean:.{digits}f}"
        return mean if math.isnan(self.half) else f"{mean} ± {self.half:.{digits}f}"


def interval(values: Sequence[float]) -> Interval | None:
    """The mean of some values; None if there are none."""
    if not values:
        return None
    if len(values) < 2:
        return Interval(values[0], math.nan, 1)
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(statistics.mean(values), float(half), len(values))


def paired(values: Mapping[int, float], others: Mapping[int, float]) -> Interval | None:
    """Values minus the others of the same seeds."""
    return interval([values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())])
