"""FLOP formulas of a collection beyond the model's own passes, each with its source.

A product of [m, k] and [k, n] is 2·m·k·n FLOPs, as torch counts.
"""

from __future__ import annotations

import torch

from curvfast import devices
from curvfast.ops import blocked, packed_rows, sum_bytes

# Of a logit: subtract the maximum, exponentiate, add up, divide, compare with the number drawn.
_FLOPS_OF_A_LOGIT = 5
# Golub and Van Loan, Matrix Computations, section 8.3: eigenvalues and vectors by symmetric QR.
_EIGH_FLOPS = 9
_EIGH_NUMBERS = 5


def moment_flops(d: int, rows: int, device: torch.device) -> int:
    """Return the FLOPs of adding ``rows`` rows of d features to a packed sum: one triangle.

    On a GPU the tiles on the diagonal are multiplied whole; on a CPU only down to the diagonal of
    narrow strips (:mod:`curvfast.ops.packed_rows`), or of steps (:mod:`curvfast.ops.blocked`).
    """
    if devices.takes_kernels(device):
        return 2 * rows * (sum_bytes(d, device) // 4)
    if packed_rows.packs(torch.float32, d):
        return 2 * rows * packed_rows.products(d)
    width, step = blocked.panel_width(d), blocked.diagonal_step(d)
    entries = 0
    for start in range(0, d, width):
        stop = min(start + width, d)
        entries += start * (stop - start)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            entries += (last - start) * (last - first)
    return 2 * rows * entries


def sampling_flops(labels: int, classes: int) -> int:
    """Return the FLOPs of drawing labels from softmax(logits) and subtracting them: 5 a logit."""
    return _FLOPS_OF_A_LOGIT * labels * classes


def eigh_flops(d: int) -> int:
    """Return the FLOPs of a symmetric eigendecomposition with vectors, about 9 d³."""
    return _EIGH_FLOPS * d**3


def eigh_bytes(d: int) -> int:
    """Return the bytes that :meth:`curvfast.Factors.eigh` needs for one factor: 5 d² of float64."""
    return 8 * _EIGH_NUMBERS * d**2
