"""The packed symmetric sum: one triangle of tiles, half the memory of a matrix, mirrored when read.

A sum of d features is cut into panels of ``width`` columns. Panel i holds columns
[i·width, (i+1)·width) of the rows above and on its diagonal tile: a contiguous matrix
[(i+1)·width, width]. So the whole is a stack of square tiles, tile (j, i) at i(i+1)/2 + j for
j ≤ i: one GEMM fills a panel, and one descriptor addresses every tile. Features past d are zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from curvfast.errors import ShapeError


@dataclass(frozen=True, eq=False)
class TriangularSum:
    """A running sum Σ x xᵀ of d features, its upper triangle of tiles packed."""

    tiles: Tensor
    """[tiles · width, width], float32 or float64."""
    d: int

    @property
    def width(self) -> int:
        """Columns of a tile."""
        return self.tiles.shape[1]

    @staticmethod
    def zeros(
        d: int,
        width: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> TriangularSum:
        """Return an empty sum.

        Raises:
            ShapeError: If ``d`` or ``width`` is not positive.
        """
        if d < 1 or width < 1:
            raise ShapeError(f"a sum needs at least one feature and column, got d={d}, {width=}")
        tiles = tile_count(d, width)
        return TriangularSum(torch.zeros(tiles * width, width, dtype=dtype, device=device), d)

    def panels(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (start, stop, view) for columns start to stop; the view is [stop, stop - start]."""
        for start in range(0, self.d, self.width):
            stop = min(start + self.width, self.d)
            offset = tile_count(start, self.width) * self.width
            yield start, stop, self.tiles[offset : offset + stop, : stop - start]

    def dense(self) -> Tensor:
        """Return the whole matrix, [d, d], exactly symmetric: its lower triangle is the upper's."""
        out = torch.empty(self.d, self.d, dtype=self.tiles.dtype, device=self.tiles.device)
        for start, stop, panel in self.panels():
            out[:start, start:stop] = panel[:start]
            out[start:stop, :start] = panel[:start].T
            upper = panel[start:].triu()
            out[start:stop, start:stop] = upper + upper.triu(1).T
        return out

    def clone(self) -> TriangularSum:
        """Return a copy."""
        return TriangularSum(self.tiles.clone(), self.d)


def pack(matrix: Tensor, width: int) -> TriangularSum:
    """Return the packed form of a symmetric matrix [d, d]; its upper triangle of tiles is read."""
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ShapeError(f"only a square matrix can be packed, got {list(matrix.shape)}")
    packed = TriangularSum.zeros(len(matrix), width, dtype=matrix.dtype, device=matrix.device)
    for start, stop, panel in packed.panels():
        panel.copy_(matrix[:stop, start:stop])
    return packed


def tile_count(d: int, width: int) -> int:
    """Return how many tiles a packed sum of d features has."""
    panels = -(-d // width)
    return panels * (panels + 1) // 2
