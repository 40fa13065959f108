"""Percentile bootstrap over texts, since tokens of one text are dependent."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

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
