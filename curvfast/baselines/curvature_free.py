"""Edits without curvature: TruncatedSVD of the weights, and RandomPairs of eigenvectors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from curvfast.baselines.baseline import Baseline, ForgetModel, ForgetTask, Trained
from curvfast.editing.edit import edit
from curvfast.errors import InputError, LayerNotFound
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.kfac.importance import singular_vectors
from curvfast.kfac.select import select
from curvfast.kfac.selection.kept_pairs import Selection
from curvfast.model.layers import linear_layers


@dataclass(frozen=True)
class TruncatedSVD(Baseline):
    """Keeps the largest singular directions of each weight; reads no text."""

    fraction: float
    """Share of each layer's rank that is kept, in (0, 1]."""

    def __post_init__(self) -> None:
        """Check the hyper-parameter.

        Raises:
            InputError: If it is out of range.
        """
        if not 0 < self.fraction <= 1:
            raise InputError(f"fraction={self.fraction}: pass a share of the rank in (0, 1]")

    def _train(self, task: ForgetTask) -> Trained:
        subject = task.subject
        basis = svd_basis(subject.model, subject.layers)
        kept = select(subject.model, basis, "svd", fraction=self.fraction)
        return Trained(subject.rewrite(lambda: edit(subject.model, basis, selection=kept)))


def svd_basis(model: nn.Module, layers: Iterable[str]) -> Eigenbasis:
    """Return the singular vectors of each weight as an eigenbasis: W = U_G diag(s) U_Aᵀ.

    Args:
        model: The unedited model.
        layers: Names of linear layers.

    Returns:
        For each layer full orthogonal bases, ordered by singular value (0 beyond the rank).

    Raises:
        LayerNotFound: If a layer is not there.
    """
    there = linear_layers(model)
    bases = {}
    for name in layers:
        if name not in there:
            raise LayerNotFound(f"no linear layer {name!r} in this {type(model).__name__}")
        bases[name] = singular_vectors(there[name].matrix())
    return Eigenbasis(bases, frame="singular")


@dataclass(frozen=True, eq=False)
class RandomPairs(Baseline):
    """Keeps as many eigenpairs of a basis as a selection does, chosen uniformly at random.

    Only layers that the basis has are changed; it reads no text.
    """

    basis: Eigenbasis
    like: Selection
    """Gives the numbers of pairs."""

    def _train(self, task: ForgetTask) -> Trained:
        model, meant = task.subject.model, task.subject.layers
        here = {name: layer for name, layer in meant.items() if name in self.basis}
        if not here:
            raise LayerNotFound(
                f"layers= means no layer of the basis, which has {', '.join(map(repr, self.basis))}"
            )
        part = self.basis.restricted(here)
        pairs = {name: self.like[name].pairs for name in here}
        kept = select(model, part, "random", pairs=pairs, seed=task.seed)
        subject = ForgetModel(model, here)
        return Trained(subject.rewrite(lambda: edit(model, part, selection=kept)))

    def _settings(self, layers: Iterable[str]) -> dict[str, Any]:
        return {"pairs": {name: self.like[name].pairs for name in layers}}
