"""Leading eigenpairs of a factor, certified, and the search for how many an edit needs.

Block Krylov subspaces with Rayleigh-Ritz, restarted from the best vectors so far, or started from
those of an earlier basis. tr(M) needs no eigenvectors, so the omitted mass is known as well.

A pair (i, j) is kept if λᵢ μⱼ ≥ τ, so eigenvectors past the last with λₖ μ₁ ≥ τ are never used. The
leading ones are computed first, a few, then more, then all; a layer is done once the last value
found of each factor lies below the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from curvfast.kfac.decomposition import NARROW, Spectrum, ordered, prepared
from curvfast.kfac.selection.staircase import staircases_by_mass, used_ranks

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


# Shares of a factor's eigenpairs computed first: beyond 1/64 a full solver is as fast.
_SHARES = (1 / 256, 1 / 64)
_FEWEST = 8
_ALL = len(_SHARES)


class LeadingSearch:
    """State of the search: the best known of each factor, and the decompositions still needed."""

    def __init__(
        self,
        widths: Mapping[str, int],
        layers: Mapping[str, tuple[str, str]],
        mass: float | None,
    ) -> None:
        """Start with no eigenpairs known.

        Args:
            widths: d of each factor.
            layers: The factors (A, G) of each layer.
            mass: Largest ρ of later edits; None needs all eigenpairs.
        """
        self.widths = widths
        self._layers = layers
        self._mass = mass
        self._level = {k: _ALL if mass is None or d < NARROW else 0 for k, d in widths.items()}
        self.found: dict[str, Spectrum] = {}
        """The best spectrum known of each factor."""

    def wanted(self) -> list[str]:
        """Return the factors to decompose next, the largest first; none when the search is done."""
        self._review()
        open_ = [key for key in self.widths if key not in self.found]
        # The largest first, so that workers finish at about the same time.
        return sorted(open_, key=lambda key: -self.widths[key])

    def count(self, key: str) -> int | None:
        """Return the number of leading eigenpairs to compute of a factor; None means all."""
        level = self._level[key]
        return None if level == _ALL else max(_FEWEST, int(_SHARES[level] * self.widths[key]))

    def note(self, key: str, spectrum: Spectrum | None) -> None:
        """Record a result; None moves the factor to the next level."""
        if spectrum is None:
            self._level[key] += 1
        else:
            self.found[key] = spectrum

    def _review(self) -> None:
        """Move factors to the next level whose leading eigenpairs do not suffice for some layer."""
        ready = {n: (g, a) for n, (a, g) in self._layers.items() if {a, g} <= self.found.keys()}
        short = {key for keys in ready.values() for key in keys if not self._whole(key)}
        if self._mass is None or not short:
            return
        values = {key: spectrum.values for key, spectrum in self.found.items()}
        # A layer without curvature has nothing to keep, at any mass.
        spectra = {
            name: (values[g], values[a])
            for name, (g, a) in ready.items()
            if values[g][0] > 0 and values[a][0] > 0
        }
        lacking: set[str] = set()
        for name, kept in staircases_by_mass(spectra, [self._mass])[0].items():
            for key, used in zip(ready[name], used_ranks(kept), strict=True):
                if key in short and used >= self.found[key].vectors.shape[1]:
                    lacking.add(key)
        for key in lacking:
            self.found.pop(key)
            self._level[key] += 1

    def _whole(self, key: str) -> bool:
        return self._level[key] == _ALL
