"""The projection of a weight onto a staircase of eigenpairs, by the cheapest exact plan.

W' = U (M ∘ (Uᵀ W V)) Vᵀ for a staircase mask M; of W [o, i] densely 4·o·i·(o + i) FLOPs.
A staircase is *split* in two: rows before s are evaluated rows first (Uᵀ W, then only the columns
each row keeps), rows from s on columns first (W V for the few columns k they keep, then only the
rows each column keeps). That takes 4·(o·i·(s + k) + i·area above + o·area below). If most is kept,
the complement, a staircase too when read from the far corner, is evaluated and subtracted from W.
Rows and columns are taken in bands, each as wide as its widest member, so what is counted is what
is executed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from curvfast.errors import InputError, ShapeError
from curvfast.ops import registry

Widths = npt.NDArray[np.int64]
ExpandContract = Callable[[Tensor, Tensor, Tensor], Tensor]
PRECISIONS = ("tf32x3", "tf32", "ieee")
# Rows or columns of a staircase evaluated together.
BAND = 128
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


@dataclass(frozen=True, eq=False)
class ProjectionRequest:
    """One projection, as every backend takes it."""

    weight: Tensor
    """W, [o, i], float32 or float64."""
    left: Tensor
    """U, [o, o], orthonormal columns."""
    right: Tensor
    """V, [i, i], orthonormal columns."""
    widths: Tensor
    """Columns of C = Uᵀ W V that each row keeps, int, on the CPU, non-increasing, [o]."""
    plan: Plan
    precision: str | None = None
    """Of the kernels' products; None is their own choice."""


def dense_flops(rows: int, columns: int) -> int:
    """Return the FLOPs of a dense evaluation."""
    return 4 * rows * columns * (rows + columns)


def project(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    widths: Tensor,
    *,
    residual: bool = False,
    precision: str | None = None,
    using: Plan | None = None,
) -> Tensor:
    """Return W' = U (M ∘ (Uᵀ W V)) Vᵀ, where row r of M keeps its first ``widths[r]`` columns.

    Only what the staircase needs is evaluated, by the cheapest exact plan; no mask is formed.

    Args:
        weight: W, [o, i], float32 or float64.
        left: U, [o, o], orthonormal columns, of W's dtype and device.
        right: V, [i, i], likewise.
        widths: int [o], non-increasing, from 0 to i.
        residual: Whether to return what is removed, W - W', instead.
        precision: Of the kernels' products on tensor cores: ``"tf32x3"`` (their default, relative
            error below 1e-5), ``"tf32"`` (1e-3) or ``"ieee"``.
        using: A plan to follow; None finds the cheapest.

    Returns:
        W', or W - W', [o, i].

    Raises:
        ShapeError: If shapes do not fit or the widths are no staircase.
        InputError: If ``precision`` is unknown.
        BackendUnavailable: If a backend was named that cannot do this.
    """
    if torch.compiler.is_compiling():
        out = torch.empty_like(weight)
        torch.ops.curvfast.project_(out, weight, left, right, widths, residual, precision)
        return out
    rows, columns = weight.shape
    if left.shape != (rows, rows) or right.shape != (columns, columns) or len(widths) != rows:
        raise ShapeError(
            f"a weight {[rows, columns]} needs left {[rows, rows]}, right {[columns, columns]} and "
            f"{rows} widths; got {list(left.shape)}, {list(right.shape)} and {len(widths)}"
        )
    kept = widths.detach().cpu().long()
    if rows and (kept[0] > columns or kept[-1] < 0 or (kept.diff() > 0).any()):
        raise ShapeError(f"widths must fall from at most {columns} to at least 0")
    if precision not in (None, *PRECISIONS):
        raise InputError(f"precision={precision!r}: pass one of {', '.join(PRECISIONS)}")
    chosen = using or plan(kept.numpy(), columns)
    request = ProjectionRequest(weight, left, right, kept, chosen, precision)
    evaluated: Tensor = registry.resolve("project", request)(request)
    return weight - evaluated if residual != chosen.complement else evaluated


def refusal(call: ProjectionRequest) -> str | None:
    """Return why torch's own products cannot run this call, or None."""
    if call.precision not in (None, "ieee"):
        return f"precision={call.precision!r} is the kernels'; torch's products here are 'ieee'"
    return None


def banded(call: ProjectionRequest) -> Tensor:
    """Evaluate the plan with torch's own products, band by band."""
    if call.plan.dense:
        coefficients = call.left.T @ call.weight @ call.right  # C = Uᵀ W V: [o, i]
        return call.left @ keep_(coefficients, call.widths) @ call.right.T
    return staircase_split(call, _expand_contract)


def staircase_split(call: ProjectionRequest, expand_contract: ExpandContract) -> Tensor:
    """Evaluate the plan's staircase in two parts: what is kept, or with ``complement`` removed.

    Args:
        call: The projection.
        expand_contract: (t [rows, n], v [n, columns], widths) -> (M ∘ (t v)) vᵀ, [rows, n].
    """
    left, right, widths = call.left, call.right, call.widths.numpy()
    if call.plan.complement:
        left, right = left.flip(1), right.flip(1)
        widths = complement_widths(widths, call.plan.columns)
    split, reach = call.plan.split, call.plan.reach
    used = int((widths > 0).sum())
    out = torch.zeros_like(call.weight)
    if split:
        top = left[:, :split]  # [o, split]
        above = expand_contract(top.T @ call.weight, right, torch.from_numpy(widths[:split].copy()))
        out.addmm_(top, above)  # [o, split] [split, i]
    if reach:
        bottom, narrow = left[:, split:used], right[:, :reach]  # [o, used - split], [i, reach]
        heights = transposed_widths(widths[split:], reach)  # [reach]
        below = expand_contract((call.weight @ narrow).T, bottom, torch.from_numpy(heights))
        out.addmm_(below.T, narrow.T)  # [o, reach] [reach, i]
    return out


def keep_(coefficients: Tensor, widths: Tensor) -> Tensor:
    """Set to zero, in place, what lies past each row's width; return it."""
    columns = torch.arange(coefficients.shape[1], device=coefficients.device)
    return coefficients.masked_fill_(columns >= widths.to(coefficients.device)[:, None], 0)


def _expand_contract(t: Tensor, v: Tensor, widths: Tensor) -> Tensor:
    out = torch.zeros_like(t)
    for start, stop, width in bands(widths.numpy()):
        narrow = v[:, :width]  # [n, width]
        out[start:stop] = keep_(t[start:stop] @ narrow, widths[start:stop]) @ narrow.T
    return out


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
    rows, dense = len(kept), dense_flops(len(kept), columns)
    if not rows:
        return Plan(0, columns, 0, 0, complement=False, dense=False, flops=0)
    cheapest = registry.resolve("cheapest_split")
    keeping = cheapest(kept, columns, band)
    removing = cheapest(complement_widths(kept, columns), columns, band)
    flops, split, reach = min(keeping, removing, key=itemgetter(0))
    if flops > _GAIN * dense:
        return Plan(rows, columns, 0, 0, complement=False, dense=True, flops=dense)
    complement = removing[0] < keeping[0]
    return Plan(rows, columns, split, reach, complement=complement, dense=False, flops=flops)


def complement_widths(widths: Widths, columns: int) -> Widths:
    """Return the widths of what a staircase leaves out, rows and columns read from their ends."""
    return columns - widths[::-1]


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
