"""Staircases: the eigenpairs of a layer that a threshold keeps, of one layer or of many.

Both eigenvalue lists descend, so {(i, j): λᵢ μⱼ ≥ τ} is a Young diagram: row i keeps its first
width[i] columns, and widths never increase. d_out integers say it all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvfast import ops
from curvfast.errors import InputError
from curvfast.kfac.selection.mask import Mask
from curvfast.kfac.selection.rule import Rule, check_mass, share_of, within
from curvfast.ops.selection import Found, Values


@dataclass(frozen=True, eq=False)
class Staircase:
    """The kept pairs of one layer, as the number of columns each row keeps."""

    widths: Tensor
    """[d_out] int32, never increasing: row i keeps columns 0 … widths[i] - 1."""
    columns: int
    """d_in."""
    threshold: float
    """Smallest product kept."""
    mass: float
    """Share of the curvature mass kept."""

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return len(self.widths), self.columns

    @property
    def pairs(self) -> int:
        """Number of pairs kept."""
        return int(self.widths.sum(dtype=torch.int64))

    @property
    def fraction(self) -> float:
        """Kept share of all pairs."""
        return self.pairs / (len(self.widths) * self.columns)

    def dense(self) -> Tensor:
        """Return the staircase as a mask, [d_out, d_in] bool: for tests and pictures."""
        return torch.arange(self.columns) < self.widths[:, None]

    def complement(self) -> Mask:
        """Return what is removed."""
        return Mask.pack(~self.dense(), 1 - self.mass)


def staircase_by_mass(values_g: Any, values_a: Any, mass: float) -> Staircase:
    """Keep the largest products λᵢμⱼ until their sum reaches ``mass`` of the total.

    The pair that reaches it is kept, and so is every pair that ties with it; exact and
    deterministic in float64. ``mass=1`` keeps every pair with any mass.

    Args:
        values_g: λ, [d_out], descending and non-negative; any float dtype.
        values_a: μ, [d_in], likewise.
        mass: ρ in (0, 1].

    Returns:
        The staircase.

    Raises:
        InputError: If ``mass`` is outside (0, 1], or a list is not a spectrum.
    """
    check_mass(mass)
    g, a = checked_spectra(None, (values_g, values_a))
    return found_staircase(ops.staircase_by_mass(g, a, float(mass)), len(a))


def staircase_by_pairs(values_g: Any, values_a: Any, pairs: int) -> Staircase:
    """Keep exactly ``pairs`` products λᵢμⱼ, the largest; ties at the end go in row order.

    Args:
        values_g: λ, [d_out], descending and non-negative; any float dtype.
        values_a: μ, [d_in], likewise.
        pairs: From 0 to d_out · d_in.

    Returns:
        The staircase.

    Raises:
        InputError: If ``pairs`` is out of range, or a list is not a spectrum.
    """
    g, a = spectrum("values_g", values_g), spectrum("values_a", values_a)
    return found_staircase(ops.staircase_by_pairs(g, a, within(pairs, len(g), len(a))), len(a))


def staircase_by_fraction(values_g: Any, values_a: Any, fraction: float) -> Staircase:
    """Keep the share ``fraction`` of all pairs, rounded to the nearest number of pairs.

    Args:
        values_g: λ, [d_out], descending and non-negative; any float dtype.
        values_a: μ, [d_in], likewise.
        fraction: In [0, 1].

    Returns:
        The staircase.

    Raises:
        InputError: If ``fraction`` is outside [0, 1], or a list is not a spectrum.
    """
    pairs = share_of(fraction, len(values_g) * len(values_a))
    return staircase_by_pairs(values_g, values_a, pairs)


def staircases(spectra: Mapping[str, tuple[Any, Any]], rule: Rule) -> dict[str, Staircase]:
    """Keep the largest products λᵢμⱼ of each layer.

    Args:
        spectra: (λ, μ) by layer name, as of :func:`staircase_by_mass`.
        rule: How much to keep.

    Returns:
        A staircase for each layer.

    Raises:
        InputError: If the rule is out of range, or a list is not a spectrum.
        LayerNotFound: If the rule is by layer name, and one is missing.
    """
    if rule.mass is None:
        return {
            name: staircase_by_pairs(g, a, rule.count(name, len(g), len(a)))
            for name, (g, a) in spectra.items()
        }
    if rule.globally:
        return staircases_by_common_mass(spectra, rule.mass)
    return staircases_by_mass(spectra, [rule.mass])[0]


def staircases_by_mass(
    spectra: Mapping[str, tuple[Any, Any]], masses: Sequence[float]
) -> list[dict[str, Staircase]]:
    """Select at several masses, every layer by its own spectrum, in one search.

    Args:
        spectra: (λ, μ) by layer name, as of :func:`staircase_by_mass`.
        masses: ρ, each in (0, 1].

    Returns:
        The staircases of all layers, for each mass.

    Raises:
        InputError: If a mass is outside (0, 1], or a list is not a spectrum.
    """
    for mass in masses:
        check_mass(mass)
    layers = {name: checked_spectra(name, pair) for name, pair in spectra.items()}
    found = ops.staircases_by_mass(
        list(layers.values()), [float(mass) for mass in masses], torch.get_num_threads()
    )
    return [
        {
            name: found_staircase(own[m], len(layers[name][1]))
            for name, own in zip(layers, found, strict=True)
        }
        for m in range(len(masses))
    ]


def staircases_by_common_mass(
    spectra: Mapping[str, tuple[Any, Any]], mass: float
) -> dict[str, Staircase]:
    """Keep the largest products of all layers together: one threshold, the largest to reach ρ.

    Args:
        spectra: (λ, μ) by layer name, as of :func:`staircase_by_mass`.
        mass: ρ in (0, 1], of the curvature mass of all layers; a layer may keep nothing.

    Returns:
        A staircase for each layer.

    Raises:
        InputError: If ``mass`` is outside (0, 1], or a list is not a spectrum.
    """
    check_mass(mass)
    layers = {
        name: (spectrum(f"λ of {name!r}", g), spectrum(f"μ of {name!r}", a))
        for name, (g, a) in spectra.items()
    }
    if not any(g[0] * a[0] > 0 for g, a in layers.values()):
        raise InputError("every eigenvalue is zero, so there is no curvature mass")
    widths, threshold = ops.staircases_by_common_mass(list(layers.values()), float(mass))
    kept = {}
    for (name, (g, a)), own in zip(layers.items(), widths, strict=True):
        prefix = np.concatenate([[0.0], np.cumsum(a)])  # Σ_{j<w} μⱼ for each width w: [d_in + 1]
        share = float((g * prefix[own]).sum() / max(g.sum() * prefix[-1], np.finfo(float).tiny))
        kept[name] = Staircase(torch.from_numpy(own), len(a), threshold, share)
    return kept


def used_ranks(kept: Staircase | Mask) -> tuple[int, int]:
    """Return how many leading rows and columns of the eigenbasis hold all that is kept."""
    if isinstance(kept, Staircase):
        return int((kept.widths > 0).sum()), int(kept.widths[0])
    return kept.ranks()


def checked_spectra(name: str | None, pair: tuple[Any, Any]) -> tuple[Values, Values]:
    """Return both spectra of a layer, checked, their products not all zero."""
    where = "" if name is None else f" of layer {name!r}"
    g, a = spectrum(f"values_g{where}", pair[0]), spectrum(f"values_a{where}", pair[1])
    if g[0] == 0 or a[0] == 0:
        raise InputError(
            f"every eigenvalue{where} is zero, so there is no curvature mass: was data collected?"
        )
    return g, a


def found_staircase(found: Found, columns: int) -> Staircase:
    """Return what a search found, as a staircase."""
    return Staircase(torch.from_numpy(found.widths), columns, found.threshold, found.kept)


def spectrum(name: str, values: Any) -> Values:
    """Return a list of eigenvalues as float64, checked."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    array = np.ascontiguousarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise InputError(f"{name} must be a list of eigenvalues [d], got shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds NaN or infinity; decompose finite factors")
    if array[-1] < 0 or (np.diff(array) > 0).any():
        raise InputError(
            f"{name} must be non-negative and in descending order, as Factors.eigh() returns them"
        )
    return array
