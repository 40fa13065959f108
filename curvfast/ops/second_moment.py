"""The second-moment operation, dispatched to the best available backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvfast.ops import blocked_second_moment, devices, registry
from curvfast.ops.packed_layout import tile_count
from curvfast.ops.packed_symmetric import TriangularSum
from curvfast.ops.requests import MomentRequest

GPU_TILE = 128


def new_sum(
    d: int, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> TriangularSum:
    """Return an empty sum of d features, with the device's preferred tile width.

    Args:
        d: Features.
        device: Device of the sum.
        dtype: float32, or float64.
    """
    return TriangularSum.zeros(d, tile_width(d, device), dtype=dtype, device=device)


def sum_bytes(d: int, device: torch.device | None = None) -> int:
    """Return the bytes :func:`new_sum` allocates for d features in float32."""
    width = tile_width(d, device)
    return 4 * tile_count(d, width) * width**2


def second_moment_(
    out: TriangularSum,
    x: Tensor,
    *,
    rows: Tensor | None = None,
    lengths: Tensor | None = None,
    weights: Tensor | None = None,
    scale: float = 1.0,
    also: TriangularSum | None = None,
    also_weights: Tensor | None = None,
    precision: str | None = None,
) -> None:
    """Add the second moment ``scale`` · Σ_t w_t x_t x_tᵀ of the counted rows to ``out`` in place.

    Args:
        out: Running sum. Written.
        x: Rows to add, [rows, d] or [sequences, length, d], any float dtype and strides; never
            copied whole. Products and sums are in the dtype of ``out``.
        rows: Indices of the counted rows, int64 [n], into x with its leading dimensions
            flattened; None for all.
        lengths: Instead of ``rows``: int32 [sequences], number of counted rows at the start of
            each.
        weights: w ≥ 0 of each row, the leading shape of x, float32; None for 1. Applied as √w on
            both sides, so the sum stays symmetric and positive.
        scale: Factor of the products.
        also: A second sum in the same pass over x. Written.
        also_weights: The weights of the second sum.
        precision: Of products of float32 rows on tensor cores: ``"bf16x4"`` (the kernels'
            default: the exact Gram matrix of x rounded to 16 bits of mantissa, relative error
            2e-5, no eigenvalue turns negative), ``"ieee"`` (exact products, slow) or ``"tf32"``
            (x rounded to 11 bits, 5e-4).

    Raises:
        ShapeError: If a shape does not fit.
        InputError: If arguments contradict each other.
        BackendUnavailable: If a backend was named that cannot do this.
    """
    if torch.compiler.is_compiling():
        torch.ops.curvfast.second_moment_(
            out.tiles, x, out.d, rows, lengths, weights, scale,
            None if also is None else also.tiles, also_weights, precision,
        )  # fmt: skip
        return
    request = MomentRequest(out, x, rows, lengths, weights, scale, also, also_weights, precision)
    registry.resolve_alike("second_moment_", request.traits)(request)


def second_moments_(requests: Sequence[MomentRequest]) -> None:
    """Run many second-moment updates, grouped into few launches where a backend supports it.

    Args:
        requests: The updates, as for :func:`second_moment_`. The tensors must not change before
            this returns.

    Raises:
        BackendUnavailable: If a backend was named that cannot do this.
    """
    together: dict[Callable[..., None], list[MomentRequest]] = {}
    for request in requests:
        run = registry.resolve_alike("second_moments_", request.traits)
        together.setdefault(run, []).append(request)
    for run, batch in together.items():
        run(batch)


def one_by_one(run: Callable[[MomentRequest], None]) -> Callable[[Sequence[MomentRequest]], None]:
    """Return a grouped operation that runs an ungrouped implementation call by call."""

    def run_all(requests: Sequence[MomentRequest]) -> None:
        for request in requests:
            run(request)

    return run_all


def tile_width(d: int, device: torch.device | None) -> int:
    """Return a device's preferred tile width for sums of d features."""
    kernels = device is not None and devices.takes_kernels(torch.device(device))
    return GPU_TILE if kernels else blocked_second_moment.panel_width(d)
