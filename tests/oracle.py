"""Brute force in float64: loops over rows, dense products, sorting. Slow, and obviously right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Record:
    """Every row that one layer saw: inputs and output gradients."""

    a: list[Tensor] = field(default_factory=list)
    g: list[Tensor] = field(default_factory=list)
    _moments: tuple[Tensor, Tensor, int] | None = None

    @property
    def rows(self) -> int:
        """How many rows count."""
        return sum(map(len, self.a))

    def moments(self) -> tuple[Tensor, Tensor, int]:
        """Return Σ a aᵀ, Σ g gᵀ by a loop over rows, and the number of rows."""
        if self._moments is None:
            self._moments = self._sum()
        return self._moments

    def _sum(self) -> tuple[Tensor, Tensor, int]:
        sums = []
        for rows in (torch.cat(self.a), torch.cat(self.g)):
            total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
            for row in rows.double():
                total += torch.outer(row, row)
            sums.append(total)
        return sums[0], sums[1], self.rows


def brute_force(
    model: nn.Module,
    layers: Sequence[str],
    batches: Sequence[dict[str, Any]],
    keep: Callable[[dict[str, Any]], Tensor],
    loss: Callable[[Any, dict[str, Any]], Tensor],
    find: Callable[[str], nn.Module] | None = None,
) -> dict[str, Record]:
    """Record the rows of each layer that count, one plain forward and backward a batch.

    The modules' own forwards are replaced for the while, so that nothing here shares code with
    hooks: a convolution becomes a loop over patches, a mixture a loop over tokens and experts.

    Args:
        model: In float64, without checkpointing.
        layers: Layer names; ``mixture.3.up_proj`` is expert 3 of the module ``mixture``.
        batches: Keyword arguments of the model.
        keep: Batch -> bool [sequences, length], which rows count.
        loss: (output, batch) -> the *summed* loss.
        find: Module name -> module; None means by the model's own names.
    """
    find = find or model.get_submodule
    records = {name: Record() for name in layers}
    owners = {name: _owner(name) for name in layers}
    modules = {owner: find(owner) for owner in owners.values()}
    for batch in batches:
        taps: list[tuple[str, Tensor, Tensor, Tensor | None]] = []
        for owner, module in modules.items():
            module.forward = _tapped(module, owner, taps)
        try:
            total = loss(model(**batch), batch)
            model.zero_grad()
            total.backward()
        finally:
            for module in modules.values():
                del module.forward
        mask = keep(batch)
        for name, x, y, positions in taps:
            if name not in records:
                continue
            g = y.grad if y.grad is not None else torch.zeros_like(y)
            if positions is not None:
                own = mask.flatten()[positions]
            elif x.shape[:-1] == mask.shape:
                own = mask
            elif x.shape[:-1].numel() == mask.numel():
                own = mask.reshape(x.shape[:-1])
            else:
                own = torch.ones(x.shape[:-1], dtype=torch.bool)
            records[name].a.append(x.detach()[own])
            records[name].g.append(g[own])
        model.zero_grad()
    return {name: record for name, record in records.items() if record.rows}


def _owner(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:-2]) if len(parts) > 2 and _is_expert(parts) else name


def _is_expert(parts: list[str]) -> bool:
    return parts[-3] == "experts" and parts[-2].isdigit() and parts[-1].endswith("_proj")


def _tapped(module: nn.Module, name: str, taps: list[Any]) -> Callable[..., Tensor]:
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return lambda x: _patch_by_patch(module, name, taps, x)
    if hasattr(module, "num_experts"):
        return lambda x, routing, weights: _token_by_token(module, name, taps, x, routing, weights)
    original = type(module).forward

    def forward(x: Tensor) -> Tensor:
        y = original(module, x)
        y.retain_grad()
        taps.append((name, x, y, None))
        return y

    return forward


def _patch_by_patch(module: Any, name: str, taps: list[Any], x: Tensor) -> Tensor:
    grid = [n // k for n, k in zip(x.shape[2:], module.kernel_size, strict=True)]
    rows = []
    for corner in product(*map(range, grid)):
        window = [slice(c * k, c * k + k) for c, k in zip(corner, module.kernel_size, strict=True)]
        rows.append(x[(slice(None), slice(None), *window)].flatten(1))
    patches = torch.stack(rows, 1)
    y = patches @ module.weight.flatten(1).T
    y.retain_grad()
    taps.append((name, patches, y, None))
    return (y if module.bias is None else y + module.bias).mT.unflatten(2, grid)


def _token_by_token(
    module: Any, name: str, taps: list[Any], x: Tensor, routing: Tensor, weights: Tensor
) -> Tensor:
    def multiply(leaf: str, expert: int, row: Tensor, token: int) -> Tensor:
        weight = getattr(module, leaf)[expert]
        y = row[None] @ (weight if module.is_transposed else weight.T)
        y.retain_grad()
        taps.append((f"{name}.{expert}.{leaf}", row[None], y, torch.tensor([token])))
        bias = getattr(module, f"{leaf}_bias", None)
        return (y if bias is None else y + bias[expert])[0]

    outputs = []
    for token, row in enumerate(x):
        total = torch.zeros_like(row)
        for expert, weight in zip(routing[token].tolist(), weights[token], strict=True):
            hidden = module._apply_gate(multiply("gate_up_proj", expert, row, token))
            total = total + weight * multiply("down_proj", expert, hidden, token)
        outputs.append(total)
    return torch.stack(outputs)


def assert_equal_factors(factors: Any, records: dict[str, Record]) -> None:
    """Compare sums, rows, spectra and leading subspaces of every layer."""
    assert set(factors) == set(records)
    for name, record in records.items():
        a, g, rows = record.moments()
        assert factors[name].rows_a == factors[name].rows_g == rows
        for mine, exact in ((factors[name].a_sum, a), (factors[name].g_sum, g)):
            assert torch.equal(mine, mine.T)
            assert (mine.double() - exact).norm() <= 1e-5 * exact.norm()
            _assert_equal_spectra(mine, exact)


def _assert_equal_spectra(mine: Tensor, exact: Tensor) -> None:
    values, reference = (torch.linalg.eigvalsh(m.double()).flip(0) for m in (mine, exact))
    top = reference > 1e-4 * reference[0]
    assert (values[top] / reference[top] - 1).abs().max() <= 1e-3
    # The leading subspace is compared where a gap in the spectrum defines it.
    gaps = reference[:-1] / reference[1:].clamp_min(1e-30)
    rank = int(gaps[: max(1, len(gaps) // 2)].argmax()) + 1
    assert subspace_overlap(mine, exact, rank) >= 1 - 1e-6


def subspace_overlap(one: Tensor, two: Tensor, rank: int) -> float:
    """Return mean cos² of the angles between the leading ``rank`` eigenvectors of two matrices."""
    u, v = (torch.linalg.eigh(m.double())[1].flip(1)[:, :rank] for m in (one, two))
    return float((u.T @ v).square().sum() / rank)
