"""Bands of a factor's eigenbasis, from the most curved components to the flattest."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from curvfast import ops
from curvfast.errors import InputError

ORDERS = ("index", "mass")


def check_bands(bands: Sequence[float], by: str) -> None:
    """Check the ends of bands.

    Args:
        bands: Upper ends, rising within (0, 1].
        by: ``"index"`` or ``"mass"``, see :func:`band_ends`.

    Raises:
        InputError: If they do not rise within (0, 1], or ``by`` is unknown.
    """
    if by not in ORDERS:
        raise InputError(f"by={by!r}: pass 'index' (shares of components) or 'mass' (of curvature)")
    if not bands or not all(low < high for low, high in pairwise([0, *bands, 1 + 1e-12])):
        raise InputError(
            f"bands={tuple(bands)}: pass where bands end, rising within (0, 1], such as "
            "(0.1, 0.25, 0.5, 1)"
        )


def band_ends(values: Tensor, bands: Sequence[float], by: str = "index") -> list[int]:
    """Return the component before which each band ends; the first begins at 0.

    Args:
        values: Eigenvalues, [d], descending and non-negative.
        bands: Upper ends, rising within (0, 1].
        by: ``"index"`` takes them as shares of the d components, rounded; ``"mass"`` as shares of
            the curvature mass Σμ, the component that reaches a share being the band's last.

    Returns:
        Ends, each at most d; a band whose end is that of the one before is empty.
    """
    d = len(values)
    if by == "index":
        return [round(share * d) for share in bands]
    reached = values.double().cumsum(0)
    wanted = torch.tensor(bands, dtype=torch.float64, device=values.device) * reached[-1]
    # With a tolerance for rounding: 0.3 of ten equal values is reached by the third.
    ends = torch.searchsorted(reached, wanted * (1 - 1e-12)) + 1
    return [
        d if share >= 1 else min(int(end), d)
        for share, end in zip(bands, ends.tolist(), strict=True)
    ]


def row_energies(x: Tensor, vectors: Tensor, ends: Sequence[int], *, layer: str) -> Tensor:
    """Return ‖U_bᵀ x‖² of each row and band.

    Args:
        x: Rows, [rows, d], any float dtype.
        vectors: U, [d, known], orthonormal columns by descending eigenvalue; fewer than d suffice
            where all that is not known lies in a last band that ends at d.
        ends: Ends of the bands, from :func:`band_ends`.
        layer: Name of the layer, for messages.

    Returns:
        Energies, float32 [rows, bands].

    Raises:
        InputError: If a band needs eigenvectors that are not known.
    """
    d, known = vectors.shape
    if ends[-1] <= known:
        return ops.band_energies(x, vectors, [0, *ends])
    inner = [0, *ends[:-1]]
    if inner[-1] > known or ends[-1] < d:
        raise InputError(
            f"the basis of layer {layer!r} holds the leading {known} of {d} eigenvectors, and "
            f"bands that end at {list(ends)} need more: decompose without mass=, or pass wider ones"
        )
    # An empty first band, so that there is one even if only the remainder is wanted.
    leading = ops.band_energies(x, vectors, [0, *inner])[:, 1:]
    rest = x.float().square().sum(1) - leading.sum(1)
    return torch.cat([leading, rest.clamp_min(0)[:, None]], dim=1)
