"""The projection of a weight onto a staircase of eigenpairs, on whichever backend can."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from curvfast.errors import InputError, ShapeError
from curvfast.ops import registry
from curvfast.ops.plan import Plan, complement_widths, plan
from curvfast.ops.staircases import bands, transposed_widths

PRECISIONS = ("tf32x3", "tf32", "ieee")
ExpandContract = Callable[[Tensor, Tensor, Tensor], Tensor]


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
        coefficients = call.left.T @ call.weight @ call.right
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
        top = left[:, :split]
        above = expand_contract(top.T @ call.weight, right, torch.from_numpy(widths[:split].copy()))
        out.addmm_(top, above)
    if reach:
        bottom, narrow = left[:, split:used], right[:, :reach]
        heights = transposed_widths(widths[split:], reach)
        below = expand_contract((call.weight @ narrow).T, bottom, torch.from_numpy(heights))
        out.addmm_(below.T, narrow.T)
    return out


def keep_(coefficients: Tensor, widths: Tensor) -> Tensor:
    """Set to zero, in place, what lies past each row's width; return it."""
    columns = torch.arange(coefficients.shape[1], device=coefficients.device)
    return coefficients.masked_fill_(columns >= widths.to(coefficients.device)[:, None], 0)


def _expand_contract(t: Tensor, v: Tensor, widths: Tensor) -> Tensor:
    out = torch.zeros_like(t)
    for start, stop, width in bands(widths.numpy()):
        narrow = v[:, :width]
        out[start:stop] = keep_(t[start:stop] @ narrow, widths[start:stop]) @ narrow.T
    return out
