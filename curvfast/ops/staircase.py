"""The staircase search on the best backend at hand: the native core, else its Python twin."""

from __future__ import annotations

import logging

from curvfast.ops import _native, reference
from curvfast.ops.reference import Found, Values

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
    search = _native.staircase_by_mass if _use_native() else reference.staircase_by_mass
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
    search = _native.staircase_by_pairs if _use_native() else reference.staircase_by_pairs
    return search(values_g, values_a, pairs)


def _use_native() -> bool:
    global _told
    reason = _native.unavailable()
    if reason and not _told:
        _told = True
        log.info(
            "staircase search in Python, about 30 times slower than the native core: %s", reason
        )
    return reason is None
