"""The cheapest exact way to evaluate W' = U (M ∘ (Uᵀ W V)) Vᵀ for a staircase mask M.

A dense evaluation of W [o, i] takes 4·o·i·(o + i) FLOPs. A staircase is *split* in two: rows
before s are evaluated rows first (Uᵀ W, then only the columns each row keeps), rows from s on
columns first (W V for the few columns k they keep, then only the rows each column keeps). That
takes 4·(o·i·(s + k) + i·area above + o·area below). If most is kept, the complement, a staircase
too when read from the far corner, is evaluated and subtracted from W. Rows and columns are taken in
bands, each as wide as its widest member, so what is counted is what is executed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from curvfast.ops import registry
from curvfast.ops.staircases import BAND, Widths

# A dense evaluation is a few large products; many small ones must promise more than that.
_GAIN = 0.9


@dataclass(frozen=True)
class Plan:
    """How one weight will be projected."""

    rows: int
    """o."""
    columns: int
    """i."""
    split: int
    """Rows before this one are evaluated rows first."""
    reach: int
    """Columns that the rows from ``split`` on need."""
    complement: bool
    """Whether what is removed is evaluated, and subtracted."""
    dense: bool
    """Whether bands are not worth their while: the mask is applied to the whole of C."""
    flops: int
    """Floating-point operations executed, the bands' surplus included."""

    @property
    def share(self) -> float:
        """Executed FLOPs over those of a dense evaluation."""
        return self.flops / max(1, dense_flops(self.rows, self.columns))


def dense_flops(rows: int, columns: int) -> int:
    """Return the FLOPs of a dense evaluation."""
    return 4 * rows * columns * (rows + columns)


def plan(widths: npt.ArrayLike, columns: int, *, band: int = BAND) -> Plan:
    """Return the cheapest plan for a staircase.

    Args:
        widths: Columns kept in each row, non-increasing, [o].
        columns: i.
        band: Rows or columns evaluated together.

    Returns:
        The plan; never more FLOPs than a dense evaluation.
    """
    kept = np.asarray(widths, np.int64)
    rows = len(kept)
    cost, split, reach = _split(kept, columns, band)
    removed = complement_widths(kept, columns)
    other, other_split, other_reach = _split(removed, columns, band)
    whole = dense_flops(rows, columns)
    if min(cost, other) > _GAIN * whole:
        return Plan(rows, columns, 0, 0, complement=False, dense=True, flops=whole)
    if other < cost:
        return Plan(
            rows, columns, other_split, other_reach, complement=True, dense=False, flops=other
        )
    return Plan(rows, columns, split, reach, complement=False, dense=False, flops=cost)


def complement_widths(widths: Widths, columns: int) -> Widths:
    """Return the widths of what a staircase leaves out, rows and columns read from their ends."""
    return columns - widths[::-1]


def _split(widths: Widths, columns: int, band: int) -> tuple[int, int, int]:
    """Return the least FLOPs, and the row and reach of the split that gives them."""
    if not len(widths):
        return 0, 0, 0
    found: tuple[int, int, int] = registry.resolve("cheapest_split")(widths, columns, band)
    return found
