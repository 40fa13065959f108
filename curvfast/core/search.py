"""Staircase searches over many layers: by any rule, at many masses, or by a common threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from curvfast import ops
from curvfast.core.rule import Rule, check_mass
from curvfast.core.selection import (
    Selection,
    Staircase,
    found_staircase,
    massive,
    spectrum,
    staircase_by_pairs,
)
from curvfast.errors import InputError


def staircases(spectra: Mapping[str, tuple[Any, Any]], rule: Rule) -> Selection:
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
        return Selection(
            {
                name: staircase_by_pairs(g, a, rule.count(name, len(g), len(a)))
                for name, (g, a) in spectra.items()
            }
        )
    if rule.globally:
        return staircases_by_common_mass(spectra, rule.mass)
    return staircases_by_mass(spectra, [rule.mass])[0]


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
