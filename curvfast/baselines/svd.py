"""Truncated singular value decomposition: the data-free rival at the same kept fraction."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from curvfast.baselines.report import ForgetReport
from curvfast.baselines.subject import choose
from curvfast.core.eigenbasis import Eigenbasis, LayerBasis
from curvfast.core.selection import Selection, Staircase
from curvfast.editing import edit
from curvfast.errors import InputError, LayerNotFound
from curvfast.layers import LayerSpec, linear_layers


@dataclass(frozen=True)
class TruncatedSVD:
    """Keeps the largest singular directions of each weight; looks at no text."""

    fraction: float
    """Share of each layer's rank that is kept, in (0, 1]."""

    def __post_init__(self) -> None:
        """Check the hyper-parameter.

        Raises:
            InputError: If it is out of range.
        """
        if not 0 < self.fraction <= 1:
            raise InputError(f"fraction={self.fraction}: pass a share of the rank in (0, 1]")

    def forget(
        self,
        model: nn.Module,
        memorized: Any = None,
        clean: Any = None,
        layers: LayerSpec = "mlp",
        *,
        seed: int = 0,
        progress: bool = True,
    ) -> ForgetReport:
        """Truncate the weights, as :class:`~.rival.Rival` says.

        Args:
            model: As there.
            memorized: Not looked at.
            clean: Not looked at.
            layers: As there.
            seed: Not looked at: nothing is random.
            progress: Not looked at.

        Returns:
            What changed.
        """
        started = time.perf_counter()
        subject = choose(model, layers)
        basis = svd_basis(subject.model, subject.layers)
        kept = svd_selection(basis, dict.fromkeys(basis, self.fraction))
        changes = subject.rewrite(lambda: edit(subject.model, basis, selection=kept))
        seconds = time.perf_counter() - started
        return ForgetReport("TruncatedSVD", {"fraction": self.fraction}, changes, seconds)


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
