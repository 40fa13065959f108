"""Truncated singular value decomposition: the data-free rival at the same kept fraction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from curvfast.core.eigenbasis import Eigenbasis, LayerBasis
from curvfast.core.selection import Selection, Staircase
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
        u, s, vh = torch.linalg.svd(there[name].matrix().double(), full_matrices=True)
        values_g, values_a = (torch.zeros(m.shape[0], dtype=torch.float64) for m in (u, vh))
        values_g[: len(s)] = values_a[: len(s)] = s.cpu()
        bases[name] = LayerBasis(values_a, vh.T.float().contiguous(), values_g, u.float())
    return Eigenbasis(bases)


def svd_selection(basis: Eigenbasis, fractions: Mapping[str, float]) -> Selection:
    """Keep the largest singular directions: the share ``fractions[layer]`` of each layer's rank."""
    return Selection({name: _leading(basis[name], fractions[name]) for name in basis})


def _leading(basis: LayerBasis, fraction: float) -> Staircase:
    rows, columns = len(basis.values_g), len(basis.values_a)
    rank = round(fraction * min(rows, columns))
    widths = torch.zeros(rows, dtype=torch.int32)
    widths[:rank] = rank
    energy = basis.values_a.square()
    kept = float(energy[:rank].sum() / energy.sum().clamp_min(1e-300))
    threshold = float(basis.values_a[rank - 1] ** 2) if rank else float("inf")
    return Staircase(widths=widths, columns=columns, threshold=threshold, mass=kept)
