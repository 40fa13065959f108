"""TruncatedSVD, and the singular vectors of weights as a basis for edits by ``"svd"``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from curvfast.baselines.rival import Baseline, ForgetTask, Trained
from curvfast.core.eigenbasis import Eigenbasis
from curvfast.core.singular import singular_vectors
from curvfast.editing import edit
from curvfast.errors import InputError, LayerNotFound
from curvfast.layers import linear_layers
from curvfast.selecting import select


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
