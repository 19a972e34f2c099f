"""Arithmetic of measurements: percentiles, medians over rounds, ratios within a round."""

import math
from collections.abc import Sequence
from statistics import median


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank percentile: the smallest value that at least `share` of all values do not exceed.

    Args:
        values: in any order; not empty.
        share: above 0, at most 1.
    """
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median over rounds of the ratio within a round: what both share in a round cancels out.

    Raises: ValueError if the numbers of rounds differ.
    """
    return median(a / b for a, b in zip(numerators, denominators, strict=True))
