"""The curvature of a task, another corpus, along the eigenvectors of a basis."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from curvfast.errors import InputError, LayerNotFound, ShapeError
from curvfast.kfac.layer_basis import LayerBasis, diagonal
from curvfast.kfac.layer_factors import LayerFactors
from curvfast.kfac.selection.scores import Term


@dataclass(frozen=True, eq=False)
class TaskCurvature:
    """Curvature of a task's corpus, added to that of an eigenbasis when pairs are ranked."""

    weight: float
    """α; negative for a forget set."""
    normalize: bool
    """Whether the task's mass is scaled to the eigenbasis's, layer by layer, before α applies."""
    spectra: Mapping[str, Term]
    """uᵢᵀ G uᵢ [d_out] and vⱼᵀ A vⱼ [d_in] by layer name, float64, non-negative, unsorted."""

    def term(self, name: str, mass: float) -> Term:
        """Return the term added to the curvature of a layer whose own mass ΣλΣμ is ``mass``."""
        g, a = self.spectra[name]
        scale = mass / float(g.sum() * a.sum()) if self.normalize else 1.0
        return self.weight * scale * g, a

    def tensors(self, key: str) -> dict[str, Tensor]:
        """Return the spectra by their names on disk, which begin with ``key``."""
        return {
            f"{key}.{side}.{name}": values
            for name, pair in self.spectra.items()
            for side, values in zip("ga", pair, strict=True)
        }

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], key: str, names: Iterable[str], **facts: Any
    ) -> TaskCurvature:
        """Read the task of that ``key``; ``facts`` are weight and normalize."""
        spectra = {n: (tensors[f"{key}.g.{n}"], tensors[f"{key}.a.{n}"]) for n in names}
        return cls(spectra=spectra, **facts)


def curvature_along(
    layers: Mapping[str, LayerBasis],
    task: Mapping[str, LayerFactors],
    weight: float,
    normalize: bool,
) -> TaskCurvature:
    """Return the curvature of ``task`` along the eigenvectors of ``layers``.

    Args:
        layers: Bases by layer name, complete.
        task: Factors of the same layers, and perhaps others.
        weight: α.
        normalize: Whether the task's mass is first scaled to the basis's, layer by layer.

    Returns:
        The diagonals of both factors in the eigenbasis; an A that layers share is read once.

    Raises:
        InputError: If ``weight`` is not finite, a basis holds leading eigenpairs only, or the
            task's factors hold NaN, infinity, or nothing but zeros.
        LayerNotFound: If the task lacks a layer.
        ShapeError: If a layer is of another width there.
    """
    if not math.isfinite(weight):
        raise InputError(f"weight={weight}: pass a finite number; below 0 forgets the task")
    missing = [name for name in layers if name not in task]
    if missing:
        raise LayerNotFound(
            f"the task has no factors of {', '.join(map(repr, missing))}: measure the same layers, "
            "or restrict the basis"
        )
    shared: dict[tuple[Hashable, int], Tensor] = {}
    spectra = {}
    for name, basis in layers.items():
        factors = task[name]
        _require_fit(name, basis, factors)
        key = basis.key_a, id(factors.a_sum)
        if key not in shared:
            shared[key] = _values(name, factors.A, basis.vectors_a)
        spectra[name] = _values(name, factors.G, basis.vectors_g), shared[key]
    return TaskCurvature(weight, normalize, spectra)


def _require_fit(name: str, basis: LayerBasis, factors: LayerFactors) -> None:
    if factors.shape != basis.shape:
        raise ShapeError(
            f"layer {name!r} is {factors.shape} in the task and {basis.shape} in the basis"
        )
    if not basis.complete:
        raise InputError(
            f"the basis of layer {name!r} holds its leading eigenpairs only, and a task bends the "
            "loss along others: decompose without mass="
        )


def _values(name: str, matrix: Tensor, vectors: Tensor) -> Tensor:
    values = diagonal(matrix, vectors).clamp_min_(0)
    if not values.isfinite().all() or not values.any():
        raise InputError(
            f"the task's factors of layer {name!r} hold NaN, infinity, or nothing but zeros: was "
            "data collected?"
        )
    return values
