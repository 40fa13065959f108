"""Every kernel once, at a size of use, against float64 on the same device.

What kernels allocate is full of NaN before they write it, and sums hold numbers before they are
added to, so that an entry that is skipped or written twice shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from gpu_timing import DEVICE, REAL
from torch import Tensor

from curvfast import ops
from curvfast.kfac.selection.staircase import staircase_by_mass
from curvfast.ops import MomentRequest, TriangularSum

Row = dict[str, Any]
TILE = 128 if REAL else 32
# float32 rows are rounded to 16 bits of mantissa.
_ROUNDING = {torch.float32: 2.0**-15, torch.bfloat16: 1e-7, torch.float16: 1e-7}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill what torch.empty returns with NaN."""
    empty = torch.empty

    def filled(*args: Any, **options: Any) -> Tensor:
        tensor = empty(*args, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    torch.empty = filled
    try:
        yield
    finally:
        torch.empty = empty


def _sizes(small: bool) -> tuple[int, int]:
    """Return rows and features: of use, or few enough for a sanitizer or the interpreter."""
    if not REAL:
        return 70, 40
    return (1000, 264) if small else (16_384, 4096)


def _moment(
    x: Tensor, counted: Tensor | None = None, weights: Tensor | None = None, **given: Any
) -> Row:
    """Add x to a sum that holds numbers, and hold the result to twice torch's own error."""
    d = x.shape[-1]
    start = torch.randn(d, d, dtype=torch.float64, device=DEVICE)
    out = ops.pack((start + start.T).float(), TILE)
    before = out.dense().double()
    ops.second_moment_(out, x, scale=0.5, weights=weights, **given)
    flat = x.flatten(0, -2) if counted is None else x.flatten(0, -2)[counted]
    return compared(out, before, flat, weights, scale=0.5)


def compared(
    out: TriangularSum, before: Tensor, rows: Tensor, weights: Tensor | None, scale: float
) -> Row:
    """Return the error of a sum that rows were added to, or raise."""
    exact_rows, single = rows.double(), rows.float()
    w = torch.ones(len(rows), device=DEVICE) if weights is None else weights.flatten()
    exact = before + scale * (exact_rows.T @ (w.double()[:, None] * exact_rows))
    torchs = before.float() + scale * (single.T @ (w[:, None] * single))
    found = out.dense()
    size = exact.norm()
    error = float((found - exact).norm() / size)
    worst = float((found - exact).abs().max() / exact.abs().max())
    rounding = _ROUNDING[rows.dtype]
    if weights is not None and rows.dtype != FP32:
        # Weighted rows are rounded to their own dtype.
        rounding = torch.finfo(rows.dtype).eps
    bound = 2 * float((torchs - exact).norm() / size) + rounding
    assert error <= bound, {"error": error, "bound": bound}
    assert worst <= 16 * bound, {"worst entry": worst, "bound": 16 * bound}
    return {"error": error, "bound": bound, "worst_entry": worst}


def whole_rows(dtype: torch.dtype, small: bool, *, narrow: bool = False) -> Row:
    rows, d = _sizes(small)
    return _moment(torch.randn(rows, min(d, 768) if narrow else d, device=DEVICE).to(dtype))


def sequences(small: bool) -> Row:
    rows, d = _sizes(small)
    x = torch.randn(8, rows // 8, d, device=DEVICE).to(BF16)
    return _moment(x[:, :-1])


def chosen_rows(dtype: torch.dtype, small: bool) -> Row:
    rows, d = _sizes(small)
    index = torch.randperm(rows, device=DEVICE)[: rows // 3].sort().values
    return _moment(torch.randn(rows, d, device=DEVICE).to(dtype), counted=index, rows=index)


def lengths(small: bool) -> Row:
    rows, d = _sizes(small)
    x = torch.randn(8, rows // 8, d, device=DEVICE).to(BF16)
    given = torch.randint(0, rows // 8 + 1, (8,), device=DEVICE, dtype=torch.int32)
    counted = (torch.arange(rows // 8, device=DEVICE) < given[:, None]).flatten().nonzero()[:, 0]
    return _moment(x, counted=counted, lengths=given)


def weighted_rows(dtype: torch.dtype, small: bool) -> Row:
    rows, d = _sizes(small)
    w = torch.rand(rows, device=DEVICE)
    return _moment(torch.randn(rows, d, device=DEVICE).to(dtype), weights=w)


def two_sums(dtype: torch.dtype, small: bool) -> Row:
    rows, d = _sizes(small)
    x = torch.randn(rows, d, device=DEVICE).to(dtype)
    w = torch.rand(rows, device=DEVICE)
    out, also = (TriangularSum.zeros(d, TILE, device=DEVICE) for _ in range(2))
    ops.second_moment_(out, x, also=also, also_weights=w)
    zero = torch.zeros(d, d, dtype=torch.float64, device=DEVICE)
    plain = compared(out, zero, x, None, 1.0)
    return {**plain, "also": compared(also, zero, x, w, 1.0)}


def grouped(small: bool, *, indexed: bool = False) -> Row:
    rows, d = _sizes(small)
    widths = (d, d // 16 * 8, 8, d)
    index = torch.arange(0, rows // 2, 3, device=DEVICE) if indexed else None
    inputs = [torch.randn(rows - 7 * i, w, device=DEVICE).to(BF16) for i, w in enumerate(widths)]
    sums = [TriangularSum.zeros(x.shape[1], TILE, device=DEVICE) for x in inputs]
    ops.second_moments_(
        [MomentRequest(s, x, rows=index) for s, x in zip(sums, inputs, strict=True)]
    )
    found = []
    for out, x in zip(sums, inputs, strict=True):
        zero = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=DEVICE)
        found.append(compared(out, zero, x if index is None else x[index], None, 1.0))
    return {**max(found, key=lambda row: row["error"]), "members": len(found)}


def packed(small: bool) -> Row:
    _, d = _sizes(small)
    matrix = torch.randn(d + 1, d + 1, device=DEVICE)
    found = []
    for backend in ("torch", "native"):
        with ops.use_backend(backend):
            both = ops.pack(matrix, TILE)
            found.append((both.tiles, both.dense()))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    return {"error": 0.0}


def projection(small: bool) -> Row:
    _, d = _sizes(small)
    sides = d, d + d // 2
    weight = torch.randn(sides, device=DEVICE)
    left, right = (torch.linalg.qr(torch.randn(s, s, device=DEVICE))[0] for s in sides)
    g, a = (1 / torch.arange(1, s + 1, dtype=torch.float64) for s in sides)
    errors = []
    for mass in (0.6, 0.95):
        widths = staircase_by_mass(g, a, mass).widths
        kept = torch.arange(sides[1], device=DEVICE) < widths.to(DEVICE)[:, None]
        w, u, v = weight.double(), left.double(), right.double()
        exact = u @ (kept * (u.T @ w @ v)) @ v.T
        found = ops.project(weight, left, right, widths)
        errors.append(float((found - exact).norm() / exact.norm()))
    assert max(errors) < 2e-5, errors
    return {"error": max(errors)}


def energies(dtype: torch.dtype, small: bool) -> Row:
    rows, d = _sizes(small)
    x = torch.randn(rows, d, device=DEVICE).to(dtype)
    vectors = torch.linalg.qr(torch.randn(d, d, device=DEVICE))[0].to(dtype)
    edges = [0, d // 3, d // 3 + 1, d]
    exact = (x.double() @ vectors.double()).square()
    exact = torch.stack([exact[:, s:e].sum(1) for s, e in pairwise(edges)], 1)
    error = float((ops.band_energies(x, vectors, edges) - exact).norm() / exact.norm())
    assert error < 1e-4, error
    return {"error": error}


def sampled(classes: int, small: bool) -> Row:
    rows = 64 if small or not REAL else 2048
    classes = classes if REAL else 300
    logits = (2 * torch.randn(rows, classes, device=DEVICE)).to(BF16)
    exact = logits.double().softmax(-1)
    labels = ops.sampled_gradient_(logits, None, torch.Generator(DEVICE).manual_seed(3))
    exact[torch.arange(rows, device=DEVICE), labels] -= 1
    error = float((logits.double() - exact).abs().max())
    assert error <= 4 * torch.finfo(BF16).eps, error
    return {"error": error}


CHECKS: dict[str, Callable[[bool], Row]] = {
    "whole-bf16": lambda small: whole_rows(BF16, small),
    "whole-bf16-narrow": lambda small: whole_rows(BF16, small, narrow=True),
    "whole-fp16": lambda small: whole_rows(FP16, small),
    "whole-fp32": lambda small: whole_rows(FP32, small),
    "sequences": sequences,
    "chosen-bf16": lambda small: chosen_rows(BF16, small),
    "chosen-fp32": lambda small: chosen_rows(FP32, small),
    "lengths": lengths,
    "weighted-bf16": lambda small: weighted_rows(BF16, small),
    "weighted-fp32": lambda small: weighted_rows(FP32, small),
    "two-sums-bf16": lambda small: two_sums(BF16, small),
    "two-sums-fp32": lambda small: two_sums(FP32, small),
    "grouped": grouped,
    "grouped-chosen": lambda small: grouped(small, indexed=True),
    "projection": projection,
    "energies-bf16": lambda small: energies(BF16, small),
    "energies-fp32": lambda small: energies(FP32, small),
    "sampled-32000": lambda small: sampled(32_000, small),
    "sampled-50257": lambda small: sampled(50_257, small),
    "packed": packed,
}


def check(name: str, size: str = "real") -> Iterator[Row]:
    """Check one kernel; ``size`` is "real", or "small" for a sanitizer."""
    torch.manual_seed(7)
    torch.set_float32_matmul_precision("highest")
    with poisoned():
        yield CHECKS[name](size == "small")
