"""The memory layout of a packed symmetric sum, and its packing and unpacking by torch.

A sum of d features is cut into panels of ``width`` columns. Panel i holds columns
[i·width, (i+1)·width) of the rows above and on its diagonal tile: a contiguous matrix
[(i+1)·width, width]. So the whole is a stack of square tiles, tile (j, i) at i(i+1)/2 + j for
j ≤ i: one GEMM fills a panel, and one descriptor addresses every tile. Features past d are zero.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# A dense matrix is mirrored this many columns at a time.
_COLUMNS = 512


def tile_count(d: int, width: int) -> int:
    """Return the number of tiles of a packed sum of d features."""
    panels = -(-d // width)
    return panels * (panels + 1) // 2


def panels(tiles: Tensor, d: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (start, stop, view) for columns start to stop; the view is [stop, stop - start]."""
    width = tiles.shape[1]
    for start in range(0, d, width):
        stop = min(start + width, d)
        offset = tile_count(start, width) * width
        yield start, stop, tiles[offset : offset + stop, : stop - start]


def pack(matrix: Tensor, tiles: Tensor) -> None:
    """Write every tile: of ``matrix`` [d, d] the upper triangle of tiles, zeros past d."""
    d, width = len(matrix), tiles.shape[1]
    if d % width:
        tiles[tile_count(d - d % width, width) * width :].zero_()
    for start, stop, panel in panels(tiles, d):
        panel.copy_(matrix[:stop, start:stop])


def unpack(tiles: Tensor, matrix: Tensor) -> None:
    """Write all of ``matrix`` [d, d]: its lower triangle is a copy of the upper."""
    for start, stop, panel in panels(tiles, len(matrix)):
        matrix[:start, start:stop] = panel[:start]
        matrix[start:stop, :start] = panel[:start].T
        matrix[start:stop, start:stop] = _mirrored(panel[start:])


def mirror_(matrix: Tensor) -> None:
    """Write the entries below the diagonal of ``matrix`` [d, d]: copies of those above."""
    for start in range(0, len(matrix), _COLUMNS):
        stop = start + _COLUMNS
        matrix[start:stop, :start] = matrix[:start, start:stop].T
        matrix[start:stop, start:stop] = _mirrored(matrix[start:stop, start:stop])


def scale_(tiles: Tensor, factor: float) -> None:
    """Multiply every value by ``factor``."""
    tiles.mul_(factor)


def _mirrored(square: Tensor) -> Tensor:
    below = torch.ones_like(square, dtype=torch.bool).tril(-1)
    return torch.where(below, square.T, square)
