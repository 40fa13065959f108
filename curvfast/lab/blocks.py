"""Blocks of a model by number, read off the names of their layers."""

from __future__ import annotations

from collections.abc import Iterable

from curvfast.core.eigenbasis import Eigenbasis
from curvfast.errors import InputError
from curvfast.layers import LayerSpec, kind


def mlp_of(blocks: Iterable[int] | None) -> LayerSpec:
    """Return the layers of the MLPs in these blocks, None meaning all."""
    if blocks is None:
        return "mlp"
    chosen = frozenset(blocks)
    return lambda name, _: kind(name) == "mlp" and block_of(name) in chosen


def block_of(name: str) -> int:
    """Return the number of the block a layer is in, -1 if its name has none."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def only(basis: Eigenbasis, blocks: Iterable[int]) -> Eigenbasis:
    """Return the part of a basis in these blocks."""
    chosen = frozenset(blocks)
    return Eigenbasis({name: basis[name] for name in basis if block_of(name) in chosen})


def require_blocks(blocks: Iterable[int] | None, count: int) -> None:
    """Check that a model of ``count`` blocks has these.

    Raises:
        InputError: If it has not, or none is given.
    """
    asked = None if blocks is None else list(blocks)
    if asked is not None and (not asked or any(not 0 <= number < count for number in asked)):
        raise InputError(f"blocks={asked}: this model has {count}, 0 to {count - 1}; pass some")
