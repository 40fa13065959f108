"""The EK-FAC correction: sums of squared gradients in the Kronecker-factored eigenbasis.

Source: George et al., "Fast Approximate Natural Gradient Descent in a Kronecker-factored
Eigenbasis", arXiv 1806.03884, the scaling that is exact on the diagonal. Rows are given as
p = U_Gᵀ g and q = U_Aᵀ a.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from curvfast.ops.blocked_second_moment import chunk_rows

EXACT, INHERITED = "ieee", "none"


@contextmanager
def exact_products() -> Iterator[None]:
    """Disable TF32 and bfloat16 for float32 products inside the block, and restore after it."""
    matmuls: list[Any] = [
        torch.backends.cuda.matmul,
        getattr(torch.backends.mkldnn, "matmul", None),
    ]
    if not all(hasattr(each, "fp32_precision") for each in matmuls):
        # Before torch 2.9 there is a single setting.
        allowed = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(allowed)
        return
    settings = [each.fp32_precision for each in matmuls]
    try:
        for each in matmuls:
            each.fp32_precision = EXACT
        yield
    finally:
        for each, setting in zip(matmuls, settings, strict=True):
            # A setting inherited from torch.backends.fp32_precision must keep following it.
            each.fp32_precision = INHERITED
            if each.fp32_precision != setting:
                each.fp32_precision = setting


# Number of entries of one sequence's gradient computed at a time.
_BLOCK_VALUES = 1 << 22


def project_rows(x: Tensor, vectors: Tensor) -> Tensor:
    """Return x V; rows of another dtype are cast a few at a time.

    Args:
        x: [rows, d], any float dtype.
        vectors: [d, k], float32 or float64.

    Returns:
        [rows, k], of the dtype of ``vectors``.
    """
    out = vectors.new_empty(x.shape[0], vectors.shape[1])  # [rows, k]
    with exact_products():
        for rows, chunk in zip(
            x.split(chunk_rows(x.shape[1])), out.split(chunk_rows(x.shape[1])), strict=True
        ):
            torch.mm(rows.to(vectors.dtype), vectors, out=chunk)
    return out


def add_by_position_(out: Tensor, p: Tensor, q: Tensor) -> None:
    """Add Σ_t p_ti² q_tj² to ``out`` in place: a sample is a position; no gradient is formed.

    Args:
        out: [k_g, k_a], float32 or float64. Written.
        p: [rows, k_g], of its dtype.
        q: [rows, k_a], likewise.
    """
    step = chunk_rows(max(out.shape))
    with exact_products():
        for left, right in zip(p.split(step), q.split(step), strict=True):
            out.addmm_(left.square().T, right.square())  # (p∘p)ᵀ (q∘q): [k_g, k_a]


def add_by_sequence_(out: Tensor, p: Tensor, q: Tensor, lengths: Sequence[int]) -> None:
    """Add Σ_n (Σ_{t of n} p_ti q_tj)² to ``out`` in place: a sample is a sequence.

    Args:
        out: [k_g, k_a], float32 or float64. Written.
        p: [rows, k_g], of its dtype, sequence after sequence.
        q: [rows, k_a], likewise.
        lengths: Rows of each sequence.
    """
    if max(lengths, default=1) == 1:
        add_by_position_(out, p, q)
        return
    block = max(1, _BLOCK_VALUES // out.shape[1])
    with exact_products():
        for left, right in zip(p.split(list(lengths)), q.split(list(lengths)), strict=True):
            for start in range(0, out.shape[0], block):
                gradient = left[:, start : start + block].T @ right  # [≤ block, k_a]
                out[start : start + block].addcmul_(gradient, gradient)
