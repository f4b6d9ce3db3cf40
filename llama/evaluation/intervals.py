"""95 % intervals: how far a metric may be from its value over infinitely many examples like these.

An interval knows nothing of examples of another kind, nor of what a model has seen in training.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

CONFIDENCE = 0.95
Z = 1.959963984540054  # a standard normal number is within +-Z with probability CONFIDENCE
RESAMPLES = 1000
SEED = 0
# The resamples of few units spread too little: for 5 numbers with a normal distribution, the interval holds the truth
# in 84 % of cases, for 10 in 90 %.
FEWEST = 20
WILSON = "Wilson score"
BOOTSTRAP = f"bootstrap over {{unit}}, percentiles of {RESAMPLES} resamples, seed {SEED}"


@dataclass(frozen=True)
class Interval:
    """From `low` to `high` at this confidence, and how it was computed."""

    low: float
    high: float
    method: str
    confidence: float = CONFIDENCE

    def exp(self) -> "Interval":
        """The interval of e to the power of the number."""
        return replace(self, low=exponential(self.low), high=exponential(self.high))


def exponential(x: float) -> float:
    """e to the power of x; infinity where no float is as large."""
    return math.exp(x) if x < math.log(sys.float_info.max) else math.inf


def wilson(successes: int, n: int) -> Interval | None:
    """The interval of a proportion p = successes / n. None for n = 0.

        (p + z^2/2n +- z sqrt(p (1-p) / n + z^2/4n^2)) / (1 + z^2/n)

    Unlike p +- z sqrt(p (1-p) / n), it stays within 0 and 1, and is no point where p is 0 or 1.
    Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953
    """
    if n == 0:
        return None
    p = successes / n
    square = Z * Z / n
    middle = (p + square / 2) / (1 + square)
    half = math.sqrt(p * (1 - p) * square + square * square / 4) / (1 + square)
    # At the ends the formula is exactly 0 or 1, which rounding misses.
    low = 0.0 if successes == 0 else middle - half
    high = 1.0 if successes == n else middle + half
    return Interval(low, high, WILSON)


def bootstrap(
    totals: Sequence[float], weights: Sequence[float] | None = None, unit: str = "examples"
) -> Interval | None:
    """The interval of sum(totals) / sum(weights), where each `unit` has a total and a weight (without `weights`: 1).

    n units are drawn with replacement from the n there are, RESAMPLES times; the interval leaves out 2.5 % of the
    ratios at either end. None for fewer than FEWEST units, and for units that are all alike: they say nothing of a
    spread.
    Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    n = len(totals)
    numerators = np.asarray(totals, np.float64)
    denominators = np.ones(n) if weights is None else np.asarray(weights, np.float64)
    if n < FEWEST or not denominators.any():
        return None
    rng = np.random.default_rng(SEED)
    ratios = []
    for _ in range(RESAMPLES):
        drawn = rng.integers(0, n, n)
        denominator = denominators[drawn].sum()
        if denominator:  # units without weight say nothing
            ratios.append(numerators[drawn].sum() / denominator)
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(ratios, [outside, 1 - outside])
    if math.isclose(low, high, rel_tol=1e-6):  # rounding makes equal units differ
        return None
    return Interval(float(low), float(high), BOOTSTRAP.format(unit=unit))
