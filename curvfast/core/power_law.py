"""How fast eigenvalues fall with their rank: the exponent of λ_k ∝ k^-α."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from curvfast.core.staircase import spectrum
from curvfast.errors import InputError
from curvfast.ops.selection import Values

# Of factors summed in float32, an eigenvalue this far below the largest is their rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class PowerLaw:
    """A straight line through eigenvalues over ranks, both in logarithms."""

    exponent: float
    """α of λ_k ∝ k^-α; 0 for a flat spectrum."""
    scale: float
    """λ that the line has at rank 1."""
    first: int
    """The first rank fitted, counted from 1."""
    last: int
    """The last rank fitted."""
    r_squared: float
    """Share of the variance of log λ over the fitted ranks that the line explains; 1 if it has
    none to explain."""

    def at(self, rank: float) -> float:
        """Return λ on the line at a rank, counted from 1."""
        return float(self.scale * rank**-self.exponent)


def power_law(values: Any, *, first: int | None = None, last: int | None = None) -> PowerLaw:
    """Fit λ_k = c · k^-α by ordinary least squares of log λ_k on log k, in float64.

    Every rank from ``first`` to ``last`` counts once. By default these are d/32 and d/2, the same
    four octaves of a spectrum of any width: the few leading eigenvalues and the cut-off of the tail
    follow laws of their own. Ranks whose λ is below 1e-6 of the largest are left out, being
    rounding; the result says what was fitted. Neighbouring points depend on each other, so a
    bootstrap over them says nothing about α: compare layers and seeds.

    Args:
        values: λ, [d], descending and non-negative; any float dtype.
        first: First rank, counted from 1; None takes max(1, d // 32).
        last: Last rank; None takes d // 2.

    Returns:
        The line.

    Raises:
        InputError: If the range is none of 1 to d, fewer than three of its eigenvalues are above
            rounding, or ``values`` is not a spectrum.
    """
    found = spectrum("values", values)
    d = len(found)
    start = max(1, d // 32) if first is None else first
    stop = d // 2 if last is None else last
    if not 1 <= start <= stop <= d:
        raise InputError(
            f"ranks {start} to {stop} of {d} eigenvalues: pass first= and last= with "
            f"1 ≤ first ≤ last ≤ {d}"
        )
    end = min(stop, resolved(found))
    if end - start < 2:
        raise InputError(
            f"{max(0, end - start + 1)} eigenvalues from rank {start} to {stop} are above rounding "
            f"({_ROUNDING:g} of the largest), and a line needs three: pass other ranks, or collect "
            "more data if the factor lacks rank"
        )
    x = np.log(np.arange(start, end + 1, dtype=np.float64))
    y = np.log(found[start - 1 : end])
    around = x - x.mean()
    slope = float(around @ y / (around @ around))
    level = float(y.mean() - slope * x.mean())
    spread = float(np.square(y - y.mean()).sum())
    missed = float(np.square(y - level - slope * x).sum())
    fit = 1 - missed / spread if spread > 0 else 1.0
    return PowerLaw(-slope, float(np.exp(level)), start, end, fit)


def resolved(values: Values) -> int:
    """Return how many of λ [d], float64 and descending, are above rounding."""
    return int((values > _ROUNDING * values[0]).sum())
