"""Brute force in float64: loops over rows, dense products, sorting. Slow, and obviously right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Record:
    """Every row that one layer saw: inputs and output gradients."""

    a: list[Tensor] = field(default_factory=list)
    g: list[Tensor] = field(default_factory=list)

    def moments(self) -> tuple[Tensor, Tensor, int]:
        """Return Σ a aᵀ, Σ g gᵀ by a loop over rows, and the number of rows."""
        sums = []
        for rows in (torch.cat(self.a), torch.cat(self.g)):
            total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
            for row in rows.double():
                total += torch.outer(row, row)
            sums.append(total)
        return sums[0], sums[1], len(torch.cat(self.a))


def brute_force(
    model: nn.Module,
    layers: Sequence[str],
    batches: Sequence[dict[str, Any]],
    keep: Callable[[dict[str, Any]], Tensor],
    loss: Callable[[Any, dict[str, Any]], Tensor],
) -> dict[str, Record]:
    """Record the rows of each layer that count, one plain forward and backward a batch.

    The layer's own forward is replaced for the while, so that nothing here shares code with hooks.

    Args:
        model: In float64, without checkpointing.
        layers: Module names.
        batches: Keyword arguments of the model.
        keep: Batch -> bool [sequences, length], which rows count.
        loss: (output, batch) -> the *summed* loss.
    """
    records = {name: Record() for name in layers}
    for batch in batches:
        taps: list[tuple[str, Tensor, Tensor]] = []
        for name in layers:
            _tap(model.get_submodule(name), name, taps)
        try:
            total = loss(model(**batch), batch)
            model.zero_grad()
            total.backward()
        finally:
            for name in layers:
                del model.get_submodule(name).forward
        mask = keep(batch)
        for name, x, y in taps:
            records[name].a.append(x.detach()[mask])
            records[name].g.append(y.grad[mask])
        model.zero_grad()
    return records


def _tap(module: nn.Module, name: str, taps: list[tuple[str, Tensor, Tensor]]) -> None:
    original = type(module).forward

    def forward(x: Tensor) -> Tensor:
        y = original(module, x)
        y.retain_grad()
        taps.append((name, x, y))
        return y

    module.forward = forward


def subspace_overlap(one: Tensor, two: Tensor, rank: int) -> float:
    """Return mean cos² of the angles between the leading ``rank`` eigenvectors of two matrices."""
    u, v = (torch.linalg.eigh(m.double())[1].flip(1)[:, :rank] for m in (one, two))
    return float((u.T @ v).square().sum() / rank)
