"""Staircases as lists of widths: their transposes, and the bands they are evaluated in."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Widths = npt.NDArray[np.int64]
BAND = 128


def transposed_widths(widths: Widths, columns: int) -> Widths:
    """Return how many rows keep each of the first ``columns`` columns: the transpose."""
    return np.searchsorted(-widths, -np.arange(columns), side="left").astype(np.int64)


def bands(widths: Widths, band: int = BAND) -> list[tuple[int, int, int]]:
    """Return (start, stop, width) of each band of rows that keeps anything."""
    starts = range(0, int((widths > 0).sum()), band)
    return [(s, min(s + band, len(widths)), int(widths[s])) for s in starts]


def banded_area(widths: Widths, band: int = BAND) -> int:
    """Return the entries evaluated for a staircase in bands."""
    return sum((stop - start) * width for start, stop, width in bands(widths, band))
