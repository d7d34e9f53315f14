"""Means with confidence intervals, for a handful of seeds."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and the half-width of its 95% confidence interval, both in the unit of the values."""

    mean: float
    half_width: float

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval."""
        return abs(self.mean) > self.half_width


def estimate(values: Sequence[float]) -> Estimate:
    """Mean with Student's t interval, for independent values that are roughly normal.

    Args:
        values: at least two.

    Raises:
        ValueError: fewer than two values, from which no interval follows.
    """
    from scipy.stats import t as student

    if len(values) < 2:
        raise ValueError(f"an interval needs at least 2 values, not {len(values)}: use more seeds")
    error = statistics.stdev(values) / math.sqrt(len(values))
    quantile = float(student.ppf((1 + CONFIDENCE) / 2, df=len(values) - 1))
    return Estimate(statistics.fmean(values), quantile * error)


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> Estimate:
    """Mean of ``value - reference`` over pairs that share a seed; narrower than two separate intervals suggest.

    Raises:
        ValueError: the sequences differ in length, or have fewer than two values.
    """
    return estimate([value - other for value, other in zip(values, reference, strict=True)])
