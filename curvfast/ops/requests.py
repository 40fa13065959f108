"""MomentRequest: arguments of a second-moment update, checked once, as every backend takes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from curvfast.errors import InputError, ShapeError
from curvfast.ops.packed_symmetric import TriangularSum

PRECISIONS = ("ieee", "tf32", "bf16x4")


class MomentTraits(NamedTuple):
    """All that decides which backend takes a second moment: alike in these, by the same one."""

    dtype: torch.dtype
    """Of the rows."""
    device: torch.device
    d: int
    adjacent: bool
    """Whether each row's features lie side by side."""
    rows_fit_32_bits: bool
    weighted: bool
    """Whether rows have weights, for one sum or two."""
    sums: tuple[tuple[torch.dtype, int], ...]
    """Dtype and tile width of each sum."""
    precision: str | None


@dataclass(frozen=True, eq=False)
class MomentRequest:
    """Arguments of one second-moment update, ``scale`` · Σ_t w_t x_t x_tᵀ over counted rows."""

    out: TriangularSum
    x: Tensor
    """[rows, d] or [sequences, length, d], any float dtype and strides."""
    rows: Tensor | None = None
    """int64 indices of the counted rows, into x with its leading dimensions flattened."""
    lengths: Tensor | None = None
    """int32 [sequences]: number of counted rows at the start of each sequence."""
    weights: Tensor | None = None
    """w ≥ 0, the leading shape of x, float32."""
    scale: float = 1.0
    also: TriangularSum | None = None
    """A second sum over the same rows, with different weights."""
    also_weights: Tensor | None = None
    precision: str | None = None
    """Precision of products of float32 rows; None is the backend's default."""

    def __post_init__(self) -> None:
        """Check every argument against the others.

        Raises:
            ShapeError: If a shape does not fit.
            InputError: If arguments contradict each other.
        """
        if self.x.dim() not in (2, 3) or not self.x.is_floating_point():
            raise ShapeError(
                f"x must be floating-point rows [rows, d] or [sequences, length, d], got "
                f"{self.x.dtype} {list(self.x.shape)}; flatten the leading dimensions: "
                "x.flatten(0, -2)"
            )
        for out in (self.out, self.also):
            if out is not None and out.d != self.x.shape[-1]:
                raise ShapeError(
                    f"x has {self.x.shape[-1]} features, the sum it is added to has {out.d}"
                )
        if self.rows is not None and self.lengths is not None:
            raise InputError("pass rows= or lengths=, not both: each says which rows count")
        if self.lengths is not None and self.lengths.shape != self.x.shape[:-2]:
            raise ShapeError(
                f"lengths= is {list(self.lengths.shape)}; it holds one length for each sequence of "
                f"x [sequences, length, d], which is {list(self.x.shape)}"
            )
        for given in (self.weights, self.also_weights):
            if given is not None and given.shape != self.x.shape[:-1]:
                raise ShapeError(
                    f"weights are {list(given.shape)}, the rows of x {list(self.x.shape[:-1])}"
                )
        if self.precision not in (None, *PRECISIONS):
            raise InputError(f"precision={self.precision!r}: pass one of {', '.join(PRECISIONS)}")
        if (self.also is None) != (self.also_weights is None):
            raise InputError("also= and also_weights= belong together: pass both or neither")

    @property
    def traits(self) -> MomentTraits:
        """What decides which backend takes it."""
        x, sums = self.x, (self.out,) if self.also is None else (self.out, self.also)
        return MomentTraits(
            x.dtype, x.device, x.shape[-1], x.stride(-1) == 1, x.shape[:-1].numel() < 1 << 31,
            self.weights is not None or self.also is not None,
            tuple((out.tiles.dtype, out.tiles.shape[1]) for out in sums), self.precision,
        )  # fmt: skip

    @property
    def d(self) -> int:
        """Features of a row."""
        return self.x.shape[-1]

    def sums(self) -> Iterator[tuple[TriangularSum, Tensor | None]]:
        """Yield each sum with its weights."""
        yield self.out, self.weights
        if self.also is not None:
            yield self.also, self.also_weights

    def read(self) -> Iterator[Tensor]:
        """Yield each tensor that is read, and must live until the call has run."""
        given = (self.x, self.rows, self.lengths, self.weights, self.also_weights)
        yield from (tensor for tensor in given if tensor is not None)

    def index(self) -> Tensor | None:
        """Return the indices of the counted rows, or None for all."""
        if self.lengths is None:
            return self.rows
        positions = torch.arange(self.x.shape[1], device=self.x.device)
        return (positions < self.lengths[:, None]).flatten().nonzero().squeeze(1)
