"""What the spectrum of a layer's curvature looks like, from the eigenvalues of its factors alone.

With λ [d_out] of G and μ [d_in] of A, both descending, the layer's curvature has the d_out · d_in
eigenvalues λᵢμⱼ. Nothing here forms them: sums factorise, and the largest of them are a staircase.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvfast.core.decomposition import decompose_factor, prepared, require_finite
from curvfast.core.factors import LayerFactors
from curvfast.core.staircase import spectrum, staircase_by_fraction
from curvfast.errors import InputError, NumericalWarning, first_line
from curvfast.ops.selection import Values

FRACTIONS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of all pairs at which a mass curve is known, unless asked otherwise."""
# Σλ and Σλ² are trace and squared norm of the matrix: what a solver may miss of them.
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class CurvatureSpectrum:
    """The spectrum λᵢμⱼ of one layer in a few numbers."""

    d_out: int
    d_in: int
    trace_g: float
    """Σλ, G being of the gradient of the *summed* loss."""
    trace_a: float
    """Σμ."""
    effective_rank_g: float
    """As of :func:`effective_rank`, from 1 to d_out; 0 if every λ is."""
    effective_rank_a: float
    """Likewise, from 1 to d_in."""
    flattest_half: float
    """Share of the curvature mass in the smaller half of all pairs; 0.5 if all are equal. Of
    factors summed in float32, below some 1e-8 it is their rounding."""
    mass: tuple[float, ...]
    """Share of the curvature mass in the largest pairs, at each fraction of them asked for."""

    @property
    def trace(self) -> float:
        """The curvature mass Σλᵢμⱼ = Σλ · Σμ."""
        return self.trace_g * self.trace_a

    @property
    def effective_rank(self) -> float:
        """The effective rank of the d_out · d_in pairs: entropies of a product add."""
        return self.effective_rank_g * self.effective_rank_a


def curvature_spectrum(
    values_g: Any, values_a: Any, fractions: Sequence[float] = FRACTIONS
) -> CurvatureSpectrum:
    """Describe the spectrum λᵢμⱼ of one layer.

    Args:
        values_g: λ, [d_out], descending and non-negative; any float dtype.
        values_a: μ, [d_in], likewise.
        fractions: As of :func:`mass_curve`.

    Returns:
        Its description; of a layer without any curvature every share is 0.

    Raises:
        InputError: If a fraction is outside [0, 1], or a list is not a spectrum.
    """
    g, a = spectrum("values_g", values_g), spectrum("values_a", values_a)
    return CurvatureSpectrum(
        d_out=len(g),
        d_in=len(a),
        trace_g=float(g.sum()),
        trace_a=float(a.sum()),
        effective_rank_g=effective_rank(g),
        effective_rank_a=effective_rank(a),
        flattest_half=flattest_share(g, a, 0.5),
        mass=mass_curve(g, a, fractions),
    )


def effective_rank(values: Any) -> float:
    """Return exp(H(p)), H the Shannon entropy in nats of p = λ / Σλ.

    From 1, for a single direction, to d, for a flat spectrum; 0 if every λ is. Scaling λ does not
    change it. Of all products λᵢμⱼ it is effective_rank(λ) · effective_rank(μ). Source: Roy and
    Vetterli, "The effective rank", EUSIPCO 2007. For (Σλ)² / Σλ² see :func:`participation_ratio`.

    Args:
        values: λ, [d], descending and non-negative; any float dtype.

    Raises:
        InputError: If it is not a spectrum.
    """
    p = _normalised(spectrum("values", values))
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum())) if len(p) else 0.0


def participation_ratio(values: Any) -> float:
    """Return (Σλ)² / Σλ²: how many equal eigenvalues would spread as much.

    At most the :func:`effective_rank`, which minds small eigenvalues more. Of all products λᵢμⱼ it
    is the product of both.

    Args:
        values: λ, [d], descending and non-negative; any float dtype.

    Raises:
        InputError: If it is not a spectrum.
    """
    squares = float(np.square(_normalised(spectrum("values", values))).sum())
    return 1 / squares if squares else 0.0


def mass_curve(values_g: Any, values_a: Any, fractions: Sequence[float]) -> tuple[float, ...]:
    """Return the share of Σλᵢμⱼ that the largest products hold, at fractions of their number.

    Exact in float64: at each fraction f the round(f · d_out · d_in) largest products are a
    staircase, row i holding λᵢ · (μ₁ + … + μ_widths[i]).

    Args:
        values_g: λ, [d_out], descending and non-negative; any float dtype.
        values_a: μ, [d_in], likewise.
        fractions: Shares of all pairs, each in [0, 1].

    Returns:
        A share for each fraction, never decreasing with it; 0 without curvature.

    Raises:
        InputError: If a fraction is outside [0, 1], or a list is not a spectrum.
    """
    g, a = spectrum("values_g", values_g), spectrum("values_a", values_a)
    return tuple(staircase_by_fraction(g, a, fraction).mass for fraction in fractions)


def flattest_share(values_g: Any, values_a: Any, fraction: float) -> float:
    """Return the share of Σλᵢμⱼ that the smallest products hold, as many as ``fraction`` of all.

    1 minus the mass curve at 1 - ``fraction``, without the cancellation: a share of 1e-20 keeps its
    digits. Row i holds λᵢ · (μ_{widths[i] + 1} + … + μ_d_in).

    Args:
        values_g: λ, [d_out], descending and non-negative; any float dtype.
        values_a: μ, [d_in], likewise.
        fraction: Of all pairs, in [0, 1].

    Returns:
        From 0 to ``fraction``, up to the rounding of the number of pairs.

    Raises:
        InputError: If ``fraction`` is outside [0, 1], or a list is not a spectrum.
    """
    if not 0 <= fraction <= 1:
        raise InputError(f"fraction={fraction}: pass a share of the eigenpairs, in [0, 1]")
    g, a = spectrum("values_g", values_g), spectrum("values_a", values_a)
    widths = staircase_by_fraction(g, a, 1 - fraction).widths.numpy()
    rest = np.append(np.cumsum(_normalised(a)[::-1])[::-1], 0.0)
    return float((_normalised(g) * rest[widths]).sum())


def factor_eigenvalues(matrix: Tensor, *, title: str) -> Tensor:
    """Return the eigenvalues of a factor, without eigenvectors: half the time of both.

    Args:
        matrix: [d, d], symmetric positive semidefinite, any float dtype.
        title: What the matrix is, for messages.

    Returns:
        [d] float64 on the CPU, descending; what rounding made negative is 0.

    Raises:
        NonFiniteError: If it holds NaN or infinity.
        DecompositionError: If every solver failed.
    """
    require_finite(matrix, title)
    try:
        scaled, exponent = prepared(matrix, torch.float64)
        values = torch.linalg.eigvalsh(scaled)
        problem = _departure(scaled, values)
    except RuntimeError as error:
        problem = first_line(error)
    if problem:
        warnings.warn(
            f"{title} is decomposed with eigenvectors: {problem}", NumericalWarning, stacklevel=2
        )
        return decompose_factor(matrix, dtype=torch.float64, title=title).values.cpu()
    return torch.ldexp(values.flip(0).clamp_min(0).cpu(), torch.tensor(exponent))


def layer_eigenvalues(
    name: str, layer: LayerFactors, known: dict[int, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues (λ of G, μ of A) of one layer.

    Args:
        name: Of the layer, for messages.
        layer: Its factors.
        known: Eigenvalues of A by the identity of its sum, added to: a shared A is solved once.

    Returns:
        [d_out] and [d_in], as of :func:`factor_eigenvalues`.

    Raises:
        NonFiniteError: If a factor holds NaN or infinity.
        DecompositionError: If every solver failed.
    """
    if id(layer.a_sum) not in known:
        known[id(layer.a_sum)] = factor_eigenvalues(layer.A, title=f"A of layer {name!r}")
    return factor_eigenvalues(layer.G, title=f"G of layer {name!r}"), known[id(layer.a_sum)]


def _normalised(values: Values) -> Values:
    total = values.sum()
    return values / total if total > 0 else values


def _departure(matrix: Tensor, values: Tensor) -> str | None:
    """Return what is wrong with eigenvalues, or None."""
    size = float(matrix.norm().clamp_min(torch.finfo(matrix.dtype).tiny))
    missed = abs(float(matrix.trace() - values.sum())) / size
    squares = abs(float(values.norm()) / size - 1) if matrix.any() else 0.0
    if not max(missed, squares) <= _TOLERANCE * len(matrix):
        return f"its eigenvalues miss its trace by {missed:.1e} and its norm by {squares:.1e}"
    return None
