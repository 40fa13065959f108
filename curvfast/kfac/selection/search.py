"""Searches over many layers: staircases by any rule, and masks of the largest scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvfast import ops
from curvfast.errors import InputError
from curvfast.kfac.selection.kept_pairs import Selection
from curvfast.kfac.selection.mask import Mask
from curvfast.kfac.selection.rule import Rule, check_mass
from curvfast.kfac.selection.staircase import (
    Staircase,
    found_staircase,
    massive,
    spectrum,
    staircase_by_pairs,
)
from curvfast.ops.selection import Kept


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


def masks(scores: Mapping[str, Tensor], rule: Rule) -> Selection:
    """Select the largest of arbitrary scores, without sorting.

    Args:
        scores: [d_out, d_in] by layer name, finite and non-negative, taken as float32.
        rule: How much to keep. ``mass`` is a share of the summed score: every score that ties with
            the one that reaches it is kept as well, and 1 keeps every score above zero. Numbers and
            fractions are exact; ties go in row order. ``globally`` holds the scores of all layers.

    Returns:
        A mask for each layer.

    Raises:
        InputError: If scores are negative or not finite, or the rule is out of range.
        LayerNotFound: If the rule is by layer name, and one is missing.
    """
    workers = torch.get_num_threads()
    if rule.globally and rule.mass is not None:
        held = {name: _checked(name, values) for name, values in scores.items()}
        if not any(top > 0 for _, top in held.values()):
            raise InputError("every score of every layer is zero, so there is no mass to share")
        found = ops.scores_by_mass([v.numpy() for v, _ in held.values()], rule.mass, workers)
        return Selection(
            {
                name: _mask(own, held[name][0].shape[1])
                for name, own in zip(held, found, strict=True)
            }
        )
    kept = {}
    for name in scores:
        values, top = _checked(name, scores[name])
        if rule.mass is None:
            count = rule.count(name, *values.shape)
            own = ops.scores_by_pairs(values.numpy(), count, workers)
        elif top > 0:
            own = ops.scores_by_mass([values.numpy()], rule.mass, workers)[0]
        else:
            raise InputError(
                f"every score of layer {name!r} is zero, so there is no mass to share: is its "
                "weight zero, or was no data collected? Pass fraction= or pairs=, or leave it out"
            )
        kept[name] = _mask(own, values.shape[1])
    return Selection(kept)


def _checked(name: str, values: Tensor) -> tuple[Tensor, float]:
    """Return scores as float32 on the CPU, and the largest of them."""
    scores = values.detach().to("cpu", torch.float32).contiguous()
    if scores.dim() != 2 or not scores.numel():
        raise InputError(f"scores of layer {name!r} must be [d_out, d_in], got {[*scores.shape]}")
    low, high = (float(edge) for edge in scores.aminmax())
    if not 0 <= low <= high < math.inf:
        raise InputError(
            f"scores of layer {name!r} must be finite and non-negative, and are from {low} to "
            f"{high}: is there NaN or infinity in its weight or curvature?"
        )
    return scores, high


def _mask(kept: Kept, columns: int) -> Mask:
    return Mask(torch.from_numpy(kept.mask), columns, kept.mass)
