"""Leading eigenpairs of a factor, with a certificate that no larger eigenvalue was missed.

Block Krylov subspaces with Rayleigh-Ritz, restarted from the best vectors so far, or started from
those of an earlier basis. tr(M) needs no eigenvectors, so the omitted mass is known as well.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from curvfast.core.decomposition import Spectrum, ordered, prepared

# Largest residual ‖Mv - θv‖ over the largest eigenvalue at which a pair counts as converged.
_FOUND = 1e-11
# The certificate cannot separate neighbours whose relative gap is smaller than this.
_GAP = 1e-6
_DEPTH = 4
_CYCLES = 6
_SPARE = 8
_SEED = 0


def leading_spectrum(
    matrix: Tensor, count: int, *, share: float, start: Tensor | None = None
) -> Spectrum | None:
    """Return about ``count`` leading eigenpairs of a positive semidefinite matrix, certified.

    Float64, on the matrix's device.

    Args:
        matrix: [d, d], any float dtype, finite.
        count: Number of pairs to compute.
        share: Share of the trace that they must hold to be useful.
        start: Initial vectors [d, n] of an earlier basis, the leading ones first; good ones save
            products.

    Returns:
        d values, descending, those not computed replaced by their mean, and [d, k] vectors; None if
        the leading pairs hold too little, do not converge soon, or cannot be certified.
    """
    d = len(matrix)
    width = count + count // 2 + _SPARE
    if _DEPTH * width > d:
        return None
    scaled, exponent = prepared(matrix, torch.float64)
    trace = float(scaled.trace())
    block = _first_block(scaled, width, start)
    for _ in range(_CYCLES):
        values, block, residuals = rayleigh_ritz(scaled, block)
        if float(values[:count].sum()) < share * trace or values[0] <= 0:
            return None
        unfound = (residuals[:count] > _FOUND * values[0]).nonzero()
        if not len(unfound):
            break
    known = _apart(values, int(unfound[0]) if len(unfound) else count)
    values, vectors = values[:known], block[:, :known]
    if not known or not none_above(scaled, values, vectors, float(values[-1])):
        return None
    left = max(0.0, trace - float(values.sum())) / (d - known)
    found = ordered(values.flip(0), vectors.flip(1), exponent, matrix.device)
    tail = found.values.new_full((d - known,), math.ldexp(left, exponent))
    return Spectrum(torch.cat([found.values, tail]), found.vectors, 0.0)


def rayleigh_ritz(matrix: Tensor, block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Ritz pairs of M in the Krylov space of a block, as many as the block has columns.

    Args:
        matrix: M, [d, d], symmetric.
        block: X, [d, n], orthonormal columns.

    Returns:
        Values [n], descending, orthonormal vectors [d, n], and each pair's residual ‖Mv - θv‖.
    """
    space, images = block, matrix @ block
    for _ in range(_DEPTH - 1):
        fresh = images[:, -block.shape[1] :]
        # Twice: what the first pass leaves is small, so its rounding errors are relatively large.
        for _ in range(2):
            fresh = torch.linalg.qr(fresh - space @ (space.T @ fresh))[0]
        space = torch.cat([space, fresh], 1)
        images = torch.cat([images, matrix @ fresh], 1)
    small = space.T @ images
    values, mixing = torch.linalg.eigh((small + small.T) / 2)
    values = values.flip(0)[: block.shape[1]]
    mixing = mixing.flip(1)[:, : block.shape[1]]
    vectors = space @ mixing
    return values, vectors, (images @ mixing - vectors * values).norm(dim=0)


def none_above(matrix: Tensor, values: Tensor, vectors: Tensor, bound: float) -> bool:
    """Certify that M has no eigenvalue of ``bound`` or more except those given.

    By Sylvester's law of inertia: σI - (M - VΘVᵀ) has a Cholesky factor if, and only if, all
    eigenvalues of the deflated M are below σ.

    Args:
        matrix: M, [d, d], symmetric.
        values: θ, [k].
        vectors: V, [d, k], orthonormal columns.
        bound: σ.

    Returns:
        Whether M has none.
    """
    orthonormal = vectors.T @ vectors - torch.eye(
        len(values), dtype=vectors.dtype, device=vectors.device
    )
    if not float(orthonormal.abs().max()) <= _FOUND:
        return False
    rest = torch.addmm(matrix, vectors * values, vectors.T, alpha=-1).neg_()
    rest.diagonal().add_(bound)
    return int(torch.linalg.cholesky_ex(rest).info) == 0


def _first_block(matrix: Tensor, width: int, start: Tensor | None) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    block = torch.randn(len(matrix), width, generator=generator, dtype=matrix.dtype, device="cpu")
    if start is not None:
        known = start[:, :width]
        block[:, : known.shape[1]] = known
    orthonormal: Tensor = torch.linalg.qr(block.to(matrix.device))[0]
    return orthonormal


def _apart(values: Tensor, found: int) -> int:
    """Return how many of the ``found`` leading values are separated from the rest by a gap."""
    wide = values[:found] - values[1 : found + 1] > _GAP * values[:found]
    return int(wide.nonzero()[-1]) + 1 if wide.any() else 0
