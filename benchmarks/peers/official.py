"""The published code's collector, in one pass, as ``benchmarks/official.py`` has it."""

from __future__ import annotations

from collections.abc import Sequence

import official
from torch import nn

from peers import DROPPED, Batch, Fit

PACKAGE = None
CONVENTION = "means over positions, of a loss that is a mean: times n, and times n · tokens²"
POSITIONS = DROPPED


def prepare(model: nn.Module, batches: Sequence[Batch], layers: Sequence[str]) -> Fit:
    return Fit(lambda: official.collect(model, batches, layers), official.Means.sums)


def prepare_sampled(model: nn.Module, batches: Sequence[Batch], layers: Sequence[str]) -> Fit:
    def run() -> official.Means:
        return official.collect(model, batches, layers, sampled=True)

    return Fit(run, official.Means.sums)
