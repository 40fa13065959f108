"""Rows: the rows of a flattened activation that count, all of them or a random subset.

Three types tell whether all count, the first ones of each sequence, or those of an index.

The canonical layout is [rows, features]: every leading dimension of an activation is flattened. A
row counts if it is a real position and, for a causal language model, not the last real position of
its sequence, whose prediction no label scores (arXiv 2510.24256, appendix on data collection).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


class Rows(ABC):
    """Which rows of an activation [..., d], its leading dimensions flattened, count."""

    @property
    @abstractmethod
    def count(self) -> int:
        """How many count."""

    @abstractmethod
    def view(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return x [..., d] as kernels take it: a view, and int64 indices of its rows that count.

        The view is [rows, d], or [sequences, length, d]; no index means that all of its rows count.
        """

    @abstractmethod
    def positions(self, chosen: Tensor) -> Tensor:
        """Return the positions of the counted rows with numbers ``chosen``, int64."""

    def take(self, x: Tensor) -> Tensor:
        """Return the rows of x [..., d] that count, [count, d]."""
        seen, index = self.view(x)
        return seen.flatten(0, -2) if index is None else seen[index]

    def indices(self, device: torch.device) -> Tensor:
        """Return the positions of the counted rows in the flattened activation, int64 [count]."""
        return self.positions(torch.arange(self.count, device=device))

    def to(self, device: torch.device) -> Rows:
        """Return the same rows for activations on a device."""
        return self


@dataclass(frozen=True)
class AllRows(Rows):
    """Every row counts."""

    total: int

    @property
    def count(self) -> int:
        """How many count."""
        return self.total

    def view(self, x: Tensor) -> tuple[Tensor, None]:
        """Return every row of x, [rows, d], without an index."""
        return x.flatten(0, -2), None

    def positions(self, chosen: Tensor) -> Tensor:
        """Return the numbers themselves: they are positions."""
        return chosen


@dataclass(frozen=True)
class FirstRows(Rows):
    """The first rows of each sequence count: a view, without an index or a copy."""

    sequences: int
    length: int
    first: int
    """How many of each sequence."""

    @property
    def count(self) -> int:
        """How many count."""
        return self.sequences * self.first

    def view(self, x: Tensor) -> tuple[Tensor, None]:
        """Return the first rows of each sequence, [sequences, first, d], without an index."""
        return x.reshape(self.sequences, self.length, x.shape[-1])[:, : self.first], None

    def positions(self, chosen: Tensor) -> Tensor:
        """Return the positions of some of these rows in the flattened activation, int64."""
        return chosen // self.first * self.length + chosen % self.first


@dataclass(frozen=True, eq=False)
class ChosenRows(Rows):
    """The rows that an index names count."""

    index: Tensor
    """int64 [count]."""

    @property
    def count(self) -> int:
        """How many count."""
        return self.index.shape[0]

    def view(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return every row of x, [rows, d], and the index of those that count."""
        return x.flatten(0, -2), self.index

    def positions(self, chosen: Tensor) -> Tensor:
        """Return the positions of some of these rows in the flattened activation, int64."""
        return self.index.to(chosen.device)[chosen]

    def indices(self, device: torch.device) -> Tensor:
        """Return the index on ``device``, not copied if it is there."""
        return self.index.to(device)

    def to(self, device: torch.device) -> Rows:
        """Return the same rows, their index on ``device``."""
        return self if self.index.device == device else ChosenRows(self.index.to(device))


@dataclass(frozen=True, eq=False)
class Thinning:
    """Row subsampling without replacement, with its own generator on the CPU."""

    part: float
    """Share of a batch's rows below 1, or a number of rows."""
    generator: torch.Generator

    def thin(self, rows: Rows, device: torch.device) -> Rows:
        """Return a uniform random subset of the rows that count.

        The number drawn depends on the number there, not on the draw, so a mean over the subset is
        an unbiased estimate of the mean over all.

        Args:
            rows: Those that count.
            device: Where indices are needed.

        Returns:
            At least one of them, if there is one.
        """
        wanted = round(self.part * rows.count) if self.part < 1 else int(self.part)
        wanted = min(max(1, wanted), rows.count)
        if wanted == rows.count:
            return rows
        order = torch.randperm(rows.count, generator=self.generator, device="cpu")  # [count]
        return ChosenRows(rows.positions(order[:wanted].sort().values.to(device)))


def nothing(rows: Rows, device: torch.device) -> Rows:
    """Return an empty set of rows."""
    return ChosenRows(torch.empty(0, dtype=torch.int64, device=device))


RowRule = Callable[[str, torch.Size], Tensor]
"""(layer name, leading shape of its input) -> bool tensor: True where a row counts."""

IGNORED_LABEL = -100
