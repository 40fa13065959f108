"""Correlation coefficients, with bootstrap intervals over runs and items."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from curvfast.analysis.resampling import Floats, interval
from curvfast.errors import InputError


def pearson(x: Any, y: Any) -> float:
    """Return Pearson's correlation coefficient.

    Args:
        x: One value an item, [items].
        y: Likewise.

    Returns:
        In [-1, 1]; NaN if either is constant.

    Raises:
        InputError: If the two are not as many numbers, at least two, or some are not finite.
    """
    one, two = _pair(x, y)
    if np.ptp(one) == 0 or np.ptp(two) == 0:
        return float("nan")
    # Scaled, so that no square overflows.
    one, two = ((v - v.mean()) / np.ptp(v) for v in (one, two))
    return float(np.clip(one @ two / np.sqrt((one @ one) * (two @ two)), -1, 1))


def spearman(x: Any, y: Any) -> float:
    """Return Spearman's rank correlation: Pearson's of the ranks, ties sharing their mean rank.

    Args:
        x: One value an item, [items].
        y: Likewise.

    Returns:
        In [-1, 1]; NaN if either is constant.

    Raises:
        InputError: If the two are not as many numbers, at least two, or some are not finite.
    """
    one, two = _pair(x, y)
    return pearson(ranks(one), ranks(two))


def ranks(values: Any) -> Floats:
    """Return ranks from 1 on, float64 [items]; equal values share the mean of their ranks."""
    own = np.asarray(values, dtype=np.float64)
    ordered = np.sort(own)
    below, upto = np.searchsorted(ordered, own, "left"), np.searchsorted(ordered, own, "right")
    return np.asarray((below + upto + 1) / 2, dtype=np.float64)


def correlation_interval(
    x: Any,
    y: Any,
    of: Callable[[Any, Any], float] = spearman,
    *,
    samples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the correlation of means over runs.

    Runs and items are both resampled with replacement: runs to average over, items to correlate.

    Args:
        x: Values, [runs, items].
        y: Likewise.
        of: :func:`pearson` or :func:`spearman`.
        samples: Number of resamples; constant ones are left out.
        confidence: Confidence level of the interval.
        seed: Seed of the resampling.

    Returns:
        Lower and upper end; NaN where no resample has a correlation.

    Raises:
        InputError: If the two are not of one shape [runs, items], or some values are not finite.
    """
    one, two = (np.asarray(values, dtype=np.float64) for values in (x, y))
    if one.ndim != 2 or one.shape != two.shape or not one.size:
        raise InputError(f"x {one.shape} and y {two.shape}: pass two of one shape [runs, items]")
    generator = np.random.default_rng(seed)
    runs, items = one.shape
    found = np.full((samples, 1), np.nan)
    for sample in found:
        chosen = np.ix_(generator.integers(runs, size=runs), generator.integers(items, size=items))
        sample[0] = of(one[chosen].mean(0), two[chosen].mean(0))
    low, high = interval(found, confidence)
    return float(low[0]), float(high[0])


def _pair(x: Any, y: Any) -> tuple[Floats, Floats]:
    one, two = (np.asarray(values, dtype=np.float64).ravel() for values in (x, y))
    if len(one) != len(two) or len(one) < 2 or not np.isfinite([one, two]).all():
        raise InputError(
            f"{len(one)} and {len(two)} values, or some not finite: pass two or more pairs"
        )
    return one, two
