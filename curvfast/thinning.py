"""Row subsampling: a random subset of each batch's rows, the same for A and G, unbiased."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from curvfast.counted_rows import ChosenRows, Rows


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
        order = torch.randperm(rows.count, generator=self.generator, device="cpu")
        return ChosenRows(rows.positions(order[:wanted].sort().values.to(device)))


def nothing(rows: Rows, device: torch.device) -> Rows:
    """Return an empty set of rows."""
    return ChosenRows(torch.empty(0, dtype=torch.int64, device=device))
