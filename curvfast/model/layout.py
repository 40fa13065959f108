"""Layout: how the leading shape of a layer's input lies over a grid [..., length] of positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

EQUAL, FLAT, TRANSPOSED, AMONG, POOLED = "equal", "flat", "transposed", "among", "pooled"


@dataclass(frozen=True)
class Layout:
    """One way in which rows [*shape] stand for the positions of a grid."""

    kind: str
    shape: torch.Size
    grid: torch.Size
    view: tuple[int, ...] = ()
    """Of the positions, 1 on the axes along which all rows stand for one; none if pooled."""
    transposed: bool = False
    """Whether positions come first and sequences second."""

    def spread(self, values: Tensor) -> Tensor:
        """Return what [*grid] values are of each row, [*shape].

        Args:
            values: Of any dtype. Where there is one row a sequence, those of its first position.
        """
        flat = values.reshape(-1, self.grid[-1])  # [sequences, length]
        if self.kind == POOLED:
            return flat[:, 0].reshape(self.shape)
        return (flat.T if self.transposed else flat).reshape(self.view).expand(self.shape)

    def positions(self, device: torch.device | None = None) -> Tensor:
        """Return the flat position that each row stands for, int64 [*shape].

        Args:
            device: Where it is needed.
        """
        numbers = torch.arange(self.grid.numel(), device=device or "cpu").view(self.grid)
        return self.spread(numbers)

    @property
    def in_order(self) -> bool:
        """Whether flattened rows come in the order of the flattened positions."""
        return not self.transposed and self.kind in (EQUAL, FLAT)


def layouts(
    shape: torch.Size, grid: torch.Size, sequence_first: bool | None = None
) -> list[Layout]:
    """Return every way in which rows [*shape] may stand for the positions of a grid.

    Rows are the grid itself, or flatten it, or have it among other axes (heads, groups), in order
    or with the two axes exchanged; or there is one a sequence. The exchange is tried where nothing
    else explains the shape.

    Args:
        shape: Leading shape of a layer's input.
        grid: [..., length].
        sequence_first: Whether a module says that its positions come before its sequences, or that
            they do not; None where none does.
    """
    sequences, length = grid[:-1].numel(), grid[-1]
    orders = [bool(sequence_first), not sequence_first]
    found: list[Layout] = []
    for transposed in orders:
        sizes = (length, sequences) if transposed else (sequences, length)
        found = _distinct(_direct(shape, grid, sizes, transposed))
        if found:
            break
    if _without_ones(shape) == _without_ones(torch.Size((sequences,))) and shape != grid:
        if shape and shape[0] == sequences:
            found.append(Layout(POOLED, shape, grid))
    return found


def _direct(
    shape: torch.Size, grid: torch.Size, sizes: tuple[int, int], transposed: bool
) -> Iterator[Layout]:
    first, second = sizes
    flat = first * second
    if not transposed and shape == grid:
        yield Layout(EQUAL, shape, grid, tuple(shape))
        return
    kind = TRANSPOSED if transposed else FLAT
    whole = [(first, second), (flat,)] if transposed else [(first, second), (flat,), tuple(grid)]
    if _without_ones(shape) in [_without_ones(torch.Size(each)) for each in whole]:
        yield Layout(kind, shape, grid, tuple(shape), transposed)
    if len(shape) < 2:
        return
    if shape[0] == flat:
        yield Layout(AMONG, shape, grid, (flat, *[1] * (len(shape) - 1)), transposed)
    if len(shape) < 3:
        return
    for i in range(len(shape)):
        for j in range(i + 1, len(shape)):
            if (shape[i], shape[j]) == sizes:
                view = tuple(n if axis in (i, j) else 1 for axis, n in enumerate(shape))
                yield Layout(AMONG, shape, grid, view, transposed)


def _distinct(found: Iterator[Layout]) -> list[Layout]:
    """Return those that differ in the positions that rows stand for."""
    kept: list[Layout] = []
    every = list(found)
    if len(every) < 2:
        return every
    for layout in every:
        own = layout.positions()
        if not any(torch.equal(own, other.positions()) for other in kept):
            kept.append(layout)
    return kept


def _without_ones(shape: torch.Size) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)
