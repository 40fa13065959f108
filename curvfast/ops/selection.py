"""Exact selection: the largest products of two spectra, a staircase, or the largest scores, a mask.

Spectra are descending, finite, non-negative and not empty, float64. The answer does not depend on
the number of threads, and the native core and the reference give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from curvfast.ops import registry

Values = npt.NDArray[np.float64]
Widths = npt.NDArray[np.int32]
ScoreMatrix = npt.NDArray[np.float32]
Bits = npt.NDArray[np.uint8]


class Found(NamedTuple):
    """What a staircase search found."""

    widths: Widths
    threshold: float
    """Smallest product kept."""
    pairs: int
    kept: float
    """Share of the mass kept."""


class Kept(NamedTuple):
    """What is kept of one layer's scores."""

    mask: Bits
    """[rows, ⌈columns / 8⌉]: bit b of byte k is column 8k + b; bits past the last column are 0."""
    pairs: int
    mass: float
    """Share of the layer's sum; 0 if that is 0."""


def staircase_by_mass(values_g: Values, values_a: Values, mass: float) -> Found:
    """Keep the largest products λᵢμⱼ whose sum first reaches ``mass`` of the total, ties included.

    Args:
        values_g: λ, [rows].
        values_a: μ, [columns].
        mass: In (0, 1].

    Returns:
        Widths and what they hold.
    """
    found: Found = registry.resolve("staircase_by_mass")(values_g, values_a, mass)
    return found


def staircase_by_pairs(values_g: Values, values_a: Values, pairs: int) -> Found:
    """Keep exactly ``pairs`` products λᵢμⱼ, the largest; ties at the end are taken in row order.

    Args:
        values_g: λ, [rows].
        values_a: μ, [columns].
        pairs: From 0 to rows times columns.

    Returns:
        Widths and what they hold.
    """
    found: Found = registry.resolve("staircase_by_pairs")(values_g, values_a, pairs)
    return found


def staircases_by_mass(
    layers: Sequence[tuple[Values, Values]], masses: Sequence[float], workers: int = 1
) -> list[list[Found]]:
    """Search every layer at every mass as :func:`staircase_by_mass` does one, in one call.

    Args:
        layers: (λ, μ) of each layer.
        masses: Each in (0, 1].
        workers: Threads.

    Returns:
        For each layer what was found at each mass.
    """
    found: list[list[Found]] = registry.resolve("staircases_by_mass")(layers, masses, workers)
    return found


def staircases_by_common_mass(
    layers: Sequence[tuple[Values, Values]], mass: float
) -> tuple[list[Widths], float]:
    """Keep the products of all layers above one threshold, the largest that reaches ``mass``.

    Args:
        layers: (λ, μ) of each layer.
        mass: In (0, 1], of the sum over layers.

    Returns:
        The widths of each layer, and the threshold.
    """
    found: tuple[list[Widths], float] = registry.resolve("staircases_by_common_mass")(layers, mass)
    return found


def scores_by_mass(layers: Sequence[ScoreMatrix], mass: float, workers: int = 1) -> list[Kept]:
    """Keep the largest scores of all layers whose sum first reaches ``mass`` of the total.

    The native core sorts nothing and copies no scores.

    Args:
        layers: Finite and non-negative, float32 [rows, columns] each.
        mass: In (0, 1]; 1 keeps every score above zero.
        workers: Threads.

    Returns:
        What is kept of each layer, ties with the smallest included.

    Raises:
        ValueError: If a score is not finite, or negative, or all are zero.
    """
    kept: list[Kept] = registry.resolve("scores_by_mass")(layers, mass, workers)
    return kept


def scores_by_pairs(scores: ScoreMatrix, pairs: int, workers: int = 1) -> Kept:
    """Keep exactly ``pairs`` scores, the largest; ties at the end are taken in row order.

    Args:
        scores: Finite and non-negative, float32 [rows, columns].
        pairs: From 0 to rows times columns.
        workers: Threads.

    Returns:
        What is kept.

    Raises:
        ValueError: If a score is not finite, or negative.
    """
    kept: Kept = registry.resolve("scores_by_pairs")(scores, pairs, workers)
    return kept
