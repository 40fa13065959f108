"""Whether rows are finite, and second moments of rows only where they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvfast.errors import ShapeError
from curvfast.ops import registry
from curvfast.ops.requests import MomentRequest


def all_finite(x: Tensor, rows: Tensor | None = None) -> bool:
    """Return whether no value of the counted rows is NaN or infinite; exact, in one pass over x.

    Of values on an accelerator the answer is waited for; :func:`finite_flag` is not.

    Args:
        x: [rows, d] or [sequences, length, d], any float dtype and strides; never copied.
        rows: int64 indices of the counted rows, into x with its leading dimensions flattened;
            None for all.

    Raises:
        ShapeError: If x is not floating-point rows.
        BackendUnavailable: If a backend was named that cannot do this.
    """
    if x.dim() not in (2, 3) or not x.is_floating_point():
        raise ShapeError(
            f"x must be floating-point rows [rows, d] or [sequences, length, d], got {x.dtype} "
            f"{list(x.shape)}"
        )
    return bool(registry.resolve("all_finite", x, rows)(x, rows))


def second_moment_if_finite_(request: MomentRequest) -> bool:
    """Run a second-moment update unless a counted row holds NaN or infinity.

    Returns:
        Whether it was run; if not, the sums are as before.

    Raises:
        BackendUnavailable: If a backend was named that cannot do this.
    """
    return bool(registry.resolve_alike("second_moment_if_finite_", request.traits)(request))


def finite_flag(x: Tensor, rows: Tensor | None = None) -> Tensor:
    """As :func:`all_finite`, as a bool tensor [] on the device of x, which is not waited for."""
    if not x.numel() or (rows is not None and not rows.numel()):
        return torch.ones((), dtype=torch.bool, device=x.device)
    if rows is None:
        # Both carry NaN on, and neither copies x.
        low, high = torch.aminmax(x)
        return torch.isfinite(low) & torch.isfinite(high)
    low, high = (each.flatten()[rows] for each in torch.aminmax(x, dim=-1))  # [count]
    return (torch.isfinite(low) & torch.isfinite(high)).all()


def by_extremes(x: Tensor, rows: Tensor | None) -> bool:
    """As :func:`all_finite`, by the least and the greatest value."""
    return bool(finite_flag(x, rows))


def looked_at_first(run: Callable[[MomentRequest], None]) -> Callable[[MomentRequest], bool]:
    """Return a checked second moment by an unchecked one: rows are read once more, before it."""

    def run_if_finite(request: MomentRequest) -> bool:
        if not all_finite(request.x, request.index()):
            return False
        run(request)
        return True

    return run_if_finite
