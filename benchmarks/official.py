"""The published code's algorithm, reimplemented from its description, for comparison.

Collector (arXiv 2510.24256, appendix on data collection): hooks hold float32 copies of inputs and
output gradients, the last position of each sequence dropped from both, until a layer's full
backward hook adds two dense products, for each layer its own; the backward is a whole one, of the
mean loss, and the sums are divided at the end. Edit: float32 eigendecompositions turned to
descending, a heap that pops products of eigenvalues until their sum reaches ρ of the total, a dense
mask of the popped pairs, and dense float32 products.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Pair = tuple[int, int]


@dataclass(frozen=True)
class Means:
    """Kronecker factors by layer, of a loss that is a mean over the tokens of a batch."""

    a: Mapping[str, Tensor]
    """E[a aᵀ], [d_in, d_in]."""
    g: Mapping[str, Tensor]
    """E[g gᵀ], [d_out, d_out]."""
    rows: int
    """Positions, of all batches."""
    tokens: int
    """Labels of each batch."""

    def sums(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return Σ a aᵀ and Σ g gᵀ of the *summed* loss: g of the mean is 1 / tokens of it."""
        scale = self.rows * self.tokens**2
        return {name: (self.a[name] * self.rows, self.g[name] * scale) for name in self.a}


def collect(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    layers: Sequence[str],
    *,
    dtype: torch.dtype = torch.float32,
    sampled: bool = False,
) -> Means:
    """Measure the factors of ``layers``; sums are of ``dtype``.

    Labels are the next tokens, or ``sampled`` from the model's own prediction.
    """
    (shape,) = {batch["input_ids"].shape for batch in batches}
    tokens = shape[0] * (shape[1] - 1)
    modules = {name: model.get_submodule(name) for name in layers}
    a, g = (
        {name: torch.zeros(d, d, dtype=dtype) for name, d in widths.items()}
        for widths in (
            {name: module.in_features for name, module in modules.items()},
            {name: module.out_features for name, module in modules.items()},
        )
    )
    with _hooked(modules, a, g, dtype):
        for batch in batches:
            logits = model(**batch, use_cache=False).logits[:, :-1]
            labels = batch["input_ids"][:, 1:].flatten()
            if sampled:
                labels = logits.detach().flatten(0, 1).softmax(-1).multinomial(1).flatten()
            cross_entropy(logits.flatten(0, 1), labels).backward()
            model.zero_grad()
    rows = tokens * len(batches)
    for total in (*a.values(), *g.values()):
        total.div_(rows)
    return Means(a, g, rows, tokens)


@contextmanager
def _hooked(
    modules: Mapping[str, nn.Module],
    a: Mapping[str, Tensor],
    g: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> Iterator[None]:
    inputs: dict[str, Tensor] = {}

    def rows(x: Tensor) -> Tensor:
        return x.detach()[:, :-1].flatten(0, 1).to(dtype)

    def keep(name: str, arguments: tuple[Any, ...]) -> None:
        inputs[name] = rows(arguments[0])

    def add(name: str, gradients: tuple[Any, ...]) -> None:
        x, dy = inputs.pop(name), rows(gradients[0])
        a[name].add_(x.T @ x)
        g[name].add_(dy.T @ dy)

    handles = []
    for name, module in modules.items():
        handles.append(module.register_forward_hook(lambda _m, x, _y, n=name: keep(n, x)))
        handles.append(module.register_full_backward_hook(lambda _m, _x, dy, n=name: add(n, dy)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, descending, and eigenvectors, in float32."""
    values, vectors = torch.linalg.eigh(matrix.float())
    return values.flip(0), vectors.flip(1)


def top_pairs(values_g: Tensor, values_a: Tensor, mass: float) -> list[Pair]:
    """Return the pairs of largest products λ_i μ_j until their sum reaches ``mass`` of the total.

    Both lists are descending. The pair that crosses is the last.
    """
    target = mass * (values_g.sum() * values_a.sum()).item()

    def entry(i: int, j: int) -> tuple[float, Pair]:
        return -(values_g[i] * values_a[j]).item(), (i, j)

    heap, seen = [entry(0, 0)], {(0, 0)}
    popped, held = [], 0.0
    while heap and held < target:
        product, (i, j) = heapq.heappop(heap)
        popped.append((i, j))
        held -= product
        for after in ((i + 1, j), (i, j + 1)):
            if after[0] < len(values_g) and after[1] < len(values_a) and after not in seen:
                seen.add(after)
                heapq.heappush(heap, entry(*after))
    return popped


def dense_mask(pairs: Sequence[Pair], shape: Sequence[int]) -> Tensor:
    """Return a bool matrix that is True at ``pairs``."""
    mask = torch.zeros(tuple(shape), dtype=torch.bool)
    if pairs:
        rows, columns = zip(*pairs, strict=True)
        mask[list(rows), list(columns)] = True
    return mask


def project(weight: Tensor, vectors_g: Tensor, vectors_a: Tensor, mask: Tensor) -> Tensor:
    """Return U_G ((U_Gᵀ W U_A) ∘ M) U_Aᵀ by dense products."""
    coefficients = vectors_g.T @ weight.float() @ vectors_a
    return vectors_g @ (coefficients * mask) @ vectors_a.T


def edit(weight: Tensor, a: Tensor, g: Tensor, mass: float) -> Tensor:
    """Return the weight [d_out, d_in] edited at one ρ, with everything computed from scratch."""
    values_g, vectors_g = eigh(g)
    values_a, vectors_a = eigh(a)
    mask = dense_mask(top_pairs(values_g, values_a, mass), weight.shape)
    return project(weight, vectors_g, vectors_a, mask)
