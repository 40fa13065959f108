"""The second-moment operations the rest of the library calls."""

from __future__ import annotations

from torch import Tensor

from curvfast.errors import ShapeError
from curvfast.ops import cpu


def second_moment_(
    out: Tensor, x: Tensor, *, rows: Tensor | None = None, scale: float = 1.0
) -> None:
    """Add ``scale`` · Σ_t x_t x_tᵀ over the chosen rows to ``out`` in place.

    Only the lower triangle of ``out`` is defined afterwards; :func:`mirror_` completes it once,
    when the sum is read. Products and sums are in the dtype of ``out``.

    Args:
        out: Running sum, shape [d, d], float32 or float64. Written.
        x: Rows to add, shape [rows, d], any float dtype and strides; never copied whole.
        rows: Indices of the rows that count, int64 [n], or None for all.
        scale: Factor of the products.

    Raises:
        ShapeError: If ``x`` is not [rows, d] for the d of ``out``.
    """
    if x.dim() != 2 or out.shape != (x.shape[1], x.shape[1]):
        raise ShapeError(
            f"second_moment_ adds rows x [rows, d] to out [d, d], got x {list(x.shape)} and out "
            f"{list(out.shape)}; flatten the leading dimensions of x first: x.flatten(0, -2)"
        )
    cpu.second_moment_(out, x, rows=rows, scale=scale)


def mirror_(out: Tensor) -> None:
    """Complete a running sum: copy its lower triangle onto the upper one, in place.

    Args:
        out: Running sum of :func:`second_moment_`, shape [d, d]. Written.
    """
    cpu.mirror_(out)
