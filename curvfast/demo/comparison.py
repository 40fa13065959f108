"""compare(): the K-FAC edit at one ρ against baselines that keep as much of each weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from curvfast.core.eigenbasis import Eigenbasis
from curvfast.editing import edited
from curvfast.selecting import select

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
