"""Rule: how much to keep, as a share of the mass, a share of the pairs, or a number of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from curvfast.errors import InputError, LayerNotFound

T = TypeVar("T", int, float)


@dataclass(frozen=True)
class Rule:
    """How much of each layer to keep: exactly one of three."""

    mass: float | None = None
    """Share in (0, 1] of the summed score to reach."""
    fraction: float | Mapping[str, float] | None = None
    """Share in [0, 1] of the pairs, of every layer or by layer name."""
    pairs: int | Mapping[str, int] | None = None
    """Number of pairs, of every layer or by layer name."""
    globally: bool = False
    """With ``mass``: one threshold for all layers."""

    def __post_init__(self) -> None:
        """Check the rule.

        Raises:
            InputError: If not exactly one is given, or it is out of range.
        """
        if sum(rule is not None for rule in (self.mass, self.fraction, self.pairs)) != 1:
            raise InputError("pass exactly one of mass=, pairs= and fraction=")
        if self.globally and self.mass is None:
            raise InputError("globally=True needs mass=: pairs and fractions are of one layer")
        if self.mass is not None:
            check_mass(self.mass)
        if isinstance(self.fraction, (int, float)):
            share_of(self.fraction, 0)

    def count(self, name: str, rows: int, columns: int) -> int:
        """Return how many of a layer's rows × columns pairs ``fraction`` or ``pairs`` keeps.

        Raises:
            InputError: If that is out of range.
            LayerNotFound: If they are given by layer name, and this one is missing.
        """
        if self.fraction is not None:
            return share_of(_own(self.fraction, "fraction", name), rows * columns)
        return within(_own(self.pairs or 0, "pairs", name), rows, columns)


def check_mass(mass: float) -> None:
    """Raise unless ``mass`` is a share."""
    if not 0 < mass <= 1:
        raise InputError(
            f"mass={mass}: pass the share of curvature mass to keep, in (0, 1]; 0.6 to 0.95 is "
            "usual"
        )


def share_of(fraction: float, size: int) -> int:
    """Return the share ``fraction`` of ``size`` pairs, rounded to the nearest number."""
    if not 0 <= fraction <= 1:
        raise InputError(f"fraction={fraction}: pass the share of eigenpairs to keep, in [0, 1]")
    return int(fraction * size + 0.5)


def within(pairs: int, rows: int, columns: int) -> int:
    """Return ``pairs`` if rows × columns are as many."""
    if not 0 <= pairs <= rows * columns:
        raise InputError(f"pairs={pairs}: there are {rows} x {columns} = {rows * columns}")
    return int(pairs)


def _own(rule: T | Mapping[str, T], title: str, name: str) -> T:
    if not isinstance(rule, Mapping):
        return rule
    if name not in rule:
        raise LayerNotFound(f"{title}= says nothing about layer {name!r}; it has {list(rule)}")
    return rule[name]
