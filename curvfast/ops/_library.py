"""Registration of the operations as ``torch.ops.curvfast``, for compiled code.

Each only writes outputs that it is given, so its fake implementation does nothing. Eager code calls
the Python functions directly, which avoids the dispatcher's overhead; compiled code calls these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from curvfast.ops.energies import band_energies
from curvfast.ops.packed_symmetric import TriangularSum
from curvfast.ops.projection import project
from curvfast.ops.sampling import sampled_gradient_
from curvfast.ops.second_moment import second_moment_

_library = torch.library.Library("curvfast", "DEF")


def _operation(schema: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function that mutates its outputs, by hand: a quarter of ``custom_op``'s cost."""
    name = schema.split("(")[0]

    def register(function: Callable[..., None]) -> Callable[..., None]:
        _library.define(f"{schema} -> ()")
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"curvfast::{name}", _nothing, lib=_library)
        return function

    return register


def _nothing(*_: Any, **__: Any) -> None:
    return None


@_operation(
    "second_moment_(Tensor(a!) tiles, Tensor x, int d, Tensor? rows=None, Tensor? lengths=None, "
    "Tensor? weights=None, float scale=1.0, Tensor(b!)? also=None, Tensor? also_weights=None, "
    "str? precision=None)"
)
def _second_moment(
    tiles: Tensor,
    x: Tensor,
    d: int,
    rows: Tensor | None = None,
    lengths: Tensor | None = None,
    weights: Tensor | None = None,
    scale: float = 1.0,
    also: Tensor | None = None,
    also_weights: Tensor | None = None,
    precision: str | None = None,
) -> None:
    second = None if also is None else TriangularSum(also, d)
    second_moment_(
        TriangularSum(tiles, d), x, rows=rows, lengths=lengths, weights=weights, scale=scale,
        also=second, also_weights=also_weights, precision=precision,
    )  # fmt: skip


@_operation(
    "project_(Tensor(a!) out, Tensor weight, Tensor left, Tensor right, Tensor widths, "
    "bool residual=False, str? precision=None)"
)
def _project(
    out: Tensor,
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    widths: Tensor,
    residual: bool = False,
    precision: str | None = None,
) -> None:
    out.copy_(project(weight, left, right, widths, residual=residual, precision=precision))


@_operation("band_energies_(Tensor(a!) out, Tensor x, Tensor vectors, int[] edges)")
def _band_energies(out: Tensor, x: Tensor, vectors: Tensor, edges: Sequence[int]) -> None:
    out.copy_(band_energies(x, vectors, edges))


@_operation("sampled_gradient_(Tensor(a!) logits, Tensor(b!) labels, Tensor? rows, int seed)")
def _sampled_gradient(logits: Tensor, labels: Tensor, rows: Tensor | None, seed: int) -> None:
    generator = torch.Generator(logits.device).manual_seed(seed)
    labels.copy_(sampled_gradient_(logits, rows, generator))
