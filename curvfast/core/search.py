"""Selections beyond one layer at one mass: many masses, a common threshold, arbitrary scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvfast import ops
from curvfast.core.selection import (
    Mask,
    Selection,
    Staircase,
    check_mass,
    found_staircase,
    massive,
    spectrum,
)
from curvfast.errors import InputError


def staircases_by_mass(
    spectra: Mapping[str, tuple[Any, Any]], masses: Sequence[float]
) -> list[Selection]:
    """Select at several masses, every layer by its own spectrum, in one search.

    Args:
        spectra: (λ, μ) by layer name, as of :func:`staircase_by_mass`.
        masses: ρ, each in (0, 1].

    Returns:
        A selection for each mass.

    Raises:
        InputError: If a mass is outside (0, 1], or a list is not a spectrum.
    """
    for mass in masses:
        check_mass(mass)
    layers = {name: massive(name, pair) for name, pair in spectra.items()}
    found = ops.staircases_by_mass(
        list(layers.values()), [float(mass) for mass in masses], torch.get_num_threads()
    )
    return [
        Selection(
            {
                name: found_staircase(own[m], len(layers[name][1]))
                for name, own in zip(layers, found, strict=True)
            }
        )
        for m in range(len(masses))
    ]


def staircases_by_common_mass(spectra: Mapping[str, tuple[Any, Any]], mass: float) -> Selection:
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
        prefix = np.concatenate([[0.0], np.cumsum(a)])
        share = float((g * prefix[own]).sum() / max(g.sum() * prefix[-1], np.finfo(float).tiny))
        kept[name] = Staircase(torch.from_numpy(own), len(a), threshold, share)
    return Selection(kept)


def mask_by_mass(scores: Tensor, mass: float) -> Mask:
    """Keep the largest of arbitrary scores until their sum reaches ``mass`` of the total.

    Nothing is sorted; ties with the score that reaches it are kept.

    Args:
        scores: [d_out, d_in], finite and non-negative; taken as float32.
        mass: In (0, 1].

    Returns:
        The mask.

    Raises:
        InputError: If ``mass`` is outside (0, 1], or the scores are no scores.
    """
    check_mass(mass)
    values = scores.detach().cpu().float().contiguous()
    if values.dim() != 2 or not values.numel() or not torch.isfinite(values).all():
        raise InputError(f"scores must be finite, [d_out, d_in], got {list(values.shape)}")
    if values.min() < 0 or values.max() <= 0:
        raise InputError("scores must be non-negative, and not all zero")
    bits, _, _, share = ops.scores_by_mass(
        values.flatten().numpy(), float(mass), torch.get_num_threads()
    )
    kept = np.unpackbits(bits, count=values.numel(), bitorder="little").astype(bool)
    return Mask(torch.from_numpy(kept).view(values.shape), share)
