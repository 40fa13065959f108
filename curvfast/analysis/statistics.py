"""Statistics: AUC, correlation coefficients, and bootstrap intervals over runs and items."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from curvfast.errors import InputError

Floats = npt.NDArray[np.float64]


def pooled(sums: Floats, counts: Floats, weights: Floats | None = None) -> Floats:
    """Return the pooled means Σ w sums / Σ w counts.

    Args:
        sums: [texts, width].
        counts: [texts, width].
        weights: Multiplicity of each text, [samples, texts]; None takes each once.

    Returns:
        [samples, width], or [width]; NaN where nothing was counted.
    """
    w = np.ones(len(sums)) if weights is None else weights
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((w @ sums) / (w @ counts), dtype=np.float64)


def draws(texts: int, samples: int, generator: np.random.Generator) -> Floats:
    """Return how often each text is in each of ``samples`` resamples, [samples, texts]."""
    return generator.multinomial(texts, np.full(texts, 1 / texts), size=samples).astype(np.float64)


def interval(samples: Floats, confidence: float) -> tuple[Floats, Floats]:
    """Return the percentile interval over the first dimension; NaN where every sample is."""
    tail = (1 - confidence) / 2
    finite = np.where(np.isfinite(samples), samples, np.nan)
    known = ~np.isnan(finite).all(axis=0)
    low, high = np.full((2, *finite.shape[1:]), np.nan)
    if len(finite) and known.any():
        low[known], high[known] = np.nanquantile(finite[:, known], [tail, 1 - tail], axis=0)
    return low, high


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


def auc(positives: Any, negatives: Any) -> float:
    """Return the area under the ROC curve: the probability that a positive outscores a negative.

    A tie counts one half, so equal scores give 0.5 and the order of either list plays no part
    (the Mann-Whitney statistic over the number of pairs).

    Args:
        positives: Scores, [n], of any float dtype.
        negatives: Scores, [m].

    Returns:
        In [0, 1].

    Raises:
        InputError: If either is empty or holds NaN.
    """
    high, low = (np.asarray(scores, dtype=np.float64).ravel() for scores in (positives, negatives))
    for name, scores in (("positives", high), ("negatives", low)):
        if not len(scores) or np.isnan(scores).any():
            raise InputError(
                f"{name} are {len(scores)} scores, some NaN or none at all: pass numbers"
            )
    low = np.sort(low)
    below, upto = np.searchsorted(low, high, "left"), np.searchsorted(low, high, "right")
    return float((below + upto).sum() / (2 * len(low) * len(high)))
