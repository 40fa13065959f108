"""TriangularSum: a packed symmetric sum, one triangle of tiles, in half the memory of a matrix.

:mod:`curvfast.ops.packed_layout` describes the memory layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from curvfast.errors import ShapeError
from curvfast.ops import packed_layout, registry
from curvfast.ops.packed_layout import tile_count


@dataclass(frozen=True, eq=False)
class TriangularSum:
    """A running sum Σ x xᵀ of d features, stored as its packed upper triangle of tiles."""

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
        _check(d, width)
        rows = tile_count(d, width) * width
        return TriangularSum(torch.zeros(rows, width, dtype=dtype, device=device), d)

    def panels(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (start, stop, view) for columns start to stop; the view is [stop, stop - start]."""
        return packed_layout.panels(self.tiles, self.d)

    def dense(self) -> Tensor:
        """Return the full matrix, [d, d], exactly symmetric: the upper triangle is mirrored.

        Raises:
            BackendUnavailable: If a backend was named that cannot do this.
        """
        out = torch.empty(self.d, self.d, dtype=self.tiles.dtype, device=self.tiles.device)
        _run("unpack", self.tiles, out)
        return out

    def scale_(self, factor: float) -> None:
        """Multiply the sum by ``factor`` in place.

        Raises:
            BackendUnavailable: If a backend was named that cannot do this.
        """
        _run("scale_", self.tiles, factor)

    def clone(self) -> TriangularSum:
        """Return a copy."""
        return TriangularSum(self.tiles.clone(), self.d)


def pack(matrix: Tensor, width: int) -> TriangularSum:
    """Return the packed form of a symmetric matrix [d, d]; its upper triangle of tiles is read.

    Raises:
        ShapeError: If ``matrix`` is not square, or it or ``width`` is empty.
        BackendUnavailable: If a backend was named that cannot do this.
    """
    _check_square(matrix, "packed")
    _check(len(matrix), width)
    rows = tile_count(len(matrix), width) * width
    tiles = torch.empty(rows, width, dtype=matrix.dtype, device=matrix.device)
    _run("pack", matrix, tiles)
    return TriangularSum(tiles, len(matrix))


def mirror_(matrix: Tensor) -> None:
    """Mirror the upper triangle of a matrix [d, d] to the lower one, in place.

    Raises:
        ShapeError: If ``matrix`` is not square.
        BackendUnavailable: If a backend was named that cannot do this.
    """
    _check_square(matrix, "mirrored")
    if len(matrix):
        _run("mirror_", matrix)


def _run(operation: str, *arguments: Tensor | float) -> None:
    # Compiled code cannot trace calls by address, so it uses torch's copies.
    compiling = torch.compiler.is_compiling()
    run = (
        getattr(packed_layout, operation) if compiling else registry.resolve(operation, *arguments)
    )
    run(*arguments)


def _check(d: int, width: int) -> None:
    if d < 1 or width < 1:
        raise ShapeError(f"a sum needs at least one feature and column, got d={d}, {width=}")


def _check_square(matrix: Tensor, verb: str) -> None:
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ShapeError(f"only a square matrix can be {verb}, got {list(matrix.shape)}")
