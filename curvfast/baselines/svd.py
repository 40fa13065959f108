"""Singular vectors of a model's weights, found once for many edits with ``importance="svd"``."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from curvfast.core.eigenbasis import Eigenbasis
from curvfast.core.singular import singular_vectors
from curvfast.errors import LayerNotFound
from curvfast.layers import linear_layers


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
