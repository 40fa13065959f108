"""The selection of arbitrary scores on the best backend at hand: the native core, else its twin."""

from __future__ import annotations

from collections.abc import Sequence

from curvfast.ops import _native, reference_scores
from curvfast.ops.reference_scores import Kept, ScoreMatrix
from curvfast.ops.staircase import use_native


def scores_by_mass(layers: Sequence[ScoreMatrix], mass: float, workers: int = 1) -> list[Kept]:
    """Keep the largest scores of all layers whose sum first reaches ``mass`` of the total.

    Nothing is sorted, and no other copy of the scores is made.

    Args:
        layers: Finite and non-negative, float32 [rows, columns] each.
        mass: In (0, 1]; 1 keeps every score above zero.
        workers: Threads; the answer does not depend on them.

    Returns:
        What is kept of each layer, ties with the smallest included.

    Raises:
        ValueError: If a score is not finite, or negative, or all are zero.
    """
    if use_native():
        return _native.scores_by_mass(layers, mass, workers)
    return reference_scores.scores_by_mass(layers, mass)


def scores_by_pairs(scores: ScoreMatrix, pairs: int, workers: int = 1) -> Kept:
    """Keep exactly ``pairs`` scores, the largest; ties at the end are taken in row order.

    Args:
        scores: Finite and non-negative, float32 [rows, columns].
        pairs: From 0 to rows times columns.
        workers: Threads; the answer does not depend on them.

    Returns:
        What is kept.

    Raises:
        ValueError: If a score is not finite, or negative.
    """
    if use_native():
        return _native.scores_by_pairs(scores, pairs, workers)
    return reference_scores.scores_by_pairs(scores, pairs)
