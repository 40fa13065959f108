"""The staircase search on the best backend at hand: the native core, else its Python twin."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from curvfast.ops import _native, reference
from curvfast.ops.reference import Found, Values, Widths

log = logging.getLogger(__name__)
_told = False


def native_status() -> str:
    """Return ``"available"``, or why the native core is not used."""
    return _native.unavailable() or "available"


def staircase_by_mass(values_g: Values, values_a: Values, mass: float) -> Found:
    """Keep the largest products λᵢμⱼ whose sum first reaches ``mass`` of the total, ties included.

    Args:
        values_g: Descending, finite, non-negative, not empty, float64.
        values_a: Likewise.
        mass: In (0, 1].

    Returns:
        Widths and what they hold.
    """
    search = _native.staircase_by_mass if use_native() else reference.staircase_by_mass
    return search(values_g, values_a, mass)


def staircase_by_pairs(values_g: Values, values_a: Values, pairs: int) -> Found:
    """Keep exactly ``pairs`` products λᵢμⱼ, the largest; ties at the end are taken in row order.

    Args:
        values_g: Descending, finite, non-negative, not empty, float64.
        values_a: Likewise.
        pairs: From 0 to rows times columns.

    Returns:
        Widths and what they hold.
    """
    search = _native.staircase_by_pairs if use_native() else reference.staircase_by_pairs
    return search(values_g, values_a, pairs)


def staircases_by_mass(
    layers: Sequence[tuple[Values, Values]], masses: Sequence[float], workers: int = 1
) -> list[list[Found]]:
    """Search every layer at every mass, in one call.

    Args:
        layers: (values_g, values_a) of each layer, as of :func:`staircase_by_mass`.
        masses: Each in (0, 1].
        workers: Threads; the answer does not depend on them.

    Returns:
        For each layer what was found at each mass.
    """
    if use_native():
        return _native.staircases_by_mass(layers, masses, workers)
    return [[reference.staircase_by_mass(g, a, mass) for mass in masses] for g, a in layers]


def staircases_by_common_mass(
    layers: Sequence[tuple[Values, Values]], mass: float
) -> tuple[list[Widths], float]:
    """Keep the products of all layers above one threshold, the largest that reaches ``mass``.

    Args:
        layers: (values_g, values_a) of each layer, as of :func:`staircase_by_mass`.
        mass: In (0, 1], of the sum over layers.

    Returns:
        The widths of each layer, and the threshold.
    """
    search = (
        _native.staircases_by_common_mass if use_native() else reference.staircases_by_common_mass
    )
    return search(layers, mass)


def use_native() -> bool:
    """Say whether the native core is there; that it is not is logged once."""
    global _told
    reason = _native.unavailable()
    if reason and not _told:
        _told = True
        log.info("selection in Python, about 30 times slower than the native core: %s", reason)
    return reason is None
