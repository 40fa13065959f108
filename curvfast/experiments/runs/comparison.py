"""compare(): the K-FAC edit at one ρ against baselines that keep as much, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from curvfast.editing.edit import edited
from curvfast.errors import InputError
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.kfac.select import select
from curvfast.model.layers import LayerSpec, kind

Measure = Callable[[nn.Module], dict[str, float]]
METHODS = ("kfac", "svd", "random")


def compare(
    model: nn.Module,
    basis: Eigenbasis,
    singular: Eigenbasis,
    mass: float,
    measure: Measure,
    *,
    seed: int,
    methods: Sequence[str] = METHODS,
) -> dict[str, Any]:
    """Edit at one curvature mass by each method, measure, and undo.

    Args:
        model: The unedited model.
        basis: Its eigenbasis of curvature.
        singular: Its singular vectors, for ``"svd"``.
        mass: ρ of the K-FAC edit; the baselines keep the same share of each layer.
        measure: Takes the edited model, gives figures by name.
        seed: Seed of the random selection.
        methods: Which of ``"kfac"``, ``"svd"``, ``"random"``.

    Returns:
        ``mass`` and, by method, the figures with ``kept_fraction`` (pairs kept over all pairs).
    """
    kept = basis.keep(mass=mass)
    sizes = {name: len(basis[name].values_a) * len(basis[name].values_g) for name in basis}
    share = sum(kept.pairs.values()) / sum(sizes.values())
    point: dict[str, Any] = {"mass": mass}
    for method in methods:
        own_basis, selection = basis, kept
        if method == "svd":
            own_basis = singular
            selection = select(model, singular, "svd", fraction=kept.fractions)
        elif method == "random":
            selection = select(model, basis, "random", pairs=kept.pairs, seed=seed)
        with edited(model, own_basis, selection=selection):
            point[method] = {**measure(model), "kept_fraction": share}
    return point


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
