"""Mask: kept pairs of one layer that do not form a staircase, one bit each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from curvfast.errors import ShapeError
from curvfast.kfac.selection.rule import within

_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)
# Number of rows unpacked at a time.
_BAND = 256


@dataclass(frozen=True, eq=False)
class Mask:
    """A bit mask of the kept pairs of one layer, eight pairs a byte."""

    kept: Tensor
    """[d_out, ⌈d_in / 8⌉] uint8 on the CPU: bit b of byte k of row i says whether pair (i, 8k + b)
    is kept. Bits past d_in are 0."""
    columns: int
    """d_in."""
    mass: float = float("nan")
    """Share of the summed score kept, where it is known."""

    def __post_init__(self) -> None:
        """Check that the packed width fits ``columns``.

        Raises:
            ShapeError: If they are not.
        """
        if self.kept.dtype != torch.uint8 or self.kept.dim() != 2:
            raise ShapeError("kept must be packed, uint8 [d_out, d_in / 8]; see Mask.pack()")
        if self.kept.shape[1] != -(-self.columns // 8):
            raise ShapeError(f"{self.kept.shape[1]} bytes a row do not hold {self.columns} columns")

    @classmethod
    def pack(cls, dense: Tensor, mass: float = float("nan")) -> Mask:
        """Pack ``dense``, [d_out, d_in] bool, into a mask."""
        bits = np.packbits(dense.cpu().numpy(), axis=1, bitorder="little")  # [d_out, ⌈d_in / 8⌉]
        return cls(torch.from_numpy(bits), dense.shape[1], mass)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.kept.shape[0], self.columns

    @property
    def pairs(self) -> int:
        """Number of pairs kept."""
        return int(_BITS[self.kept.numpy()].sum(dtype=np.int64))

    @property
    def fraction(self) -> float:
        """Kept share of all pairs."""
        return self.pairs / (len(self.kept) * self.columns)

    def dense(self) -> Tensor:
        """Return the mask unpacked, [d_out, d_in] bool."""
        return unpacked(self.kept, self.columns)

    def bands(
        self, rows: int, columns: int, device: torch.device
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield bands of rows of the leading block, each with its unpacked mask.

        Args:
            rows: Rows of the block.
            columns: Columns of the block.
            device: Device of each band, bool.
        """
        for start in range(0, rows, _BAND):
            band = slice(start, min(start + _BAND, rows))
            yield band, unpacked(self.kept[band], columns).to(device)

    def ranks(self) -> tuple[int, int]:
        """Return the number of leading rows and columns that hold all kept pairs."""
        bits = self.kept.numpy()
        # [d_in], padded to whole bytes.
        columns = np.unpackbits(np.bitwise_or.reduce(bits, axis=0), bitorder="little")
        used = np.flatnonzero(bits.any(1)), np.flatnonzero(columns)
        last_row, last_column = (int(u[-1]) if len(u) else -1 for u in used)
        return last_row + 1, last_column + 1

    def complement(self) -> Mask:
        """Return the mask of the removed pairs."""
        whole = np.packbits(np.ones(self.columns, bool), bitorder="little")  # [⌈d_in / 8⌉]
        return Mask(self.kept ^ torch.from_numpy(whole), self.columns, 1 - self.mass)


def unpacked(bits: Tensor, columns: int) -> Tensor:
    """Return packed bits [rows, ⌈columns / 8⌉] uint8 as bool [rows, columns]."""
    dense = np.unpackbits(bits.numpy(), axis=1, count=columns, bitorder="little")
    return torch.from_numpy(dense).view(torch.bool)


def random_mask(rows: int, columns: int, pairs: int, generator: torch.Generator) -> Mask:
    """Keep exactly ``pairs`` of rows × columns pairs, uniformly at random.

    Args:
        rows: d_out.
        columns: d_in.
        pairs: From 0 to rows · columns.
        generator: Random generator on the CPU; its state advances.

    Returns:
        The mask.

    Raises:
        InputError: If ``pairs`` is out of range.
    """
    within(pairs, rows, columns)
    kept = torch.zeros(rows * columns, dtype=torch.bool, device="cpu")
    kept[torch.randperm(rows * columns, generator=generator, device="cpu")[:pairs]] = True
    return Mask.pack(kept.view(rows, columns))
