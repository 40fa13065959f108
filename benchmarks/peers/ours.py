"""curvfast itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

import curvfast
from peers import DROPPED, Batch, Fit, Moments

PACKAGE = "curvfast"
CONVENTION = "plain sums"
POSITIONS = DROPPED


def prepare(model: nn.Module, batches: Sequence[Batch], layers: Sequence[str]) -> Fit:
    return _fit(model, batches, layers, "gold")


def prepare_sampled(model: nn.Module, batches: Sequence[Batch], layers: Sequence[str]) -> Fit:
    return _fit(model, batches, layers, "sampled")


def _fit(
    model: nn.Module,
    batches: Sequence[Batch],
    layers: Sequence[str],
    labels: Literal["gold", "sampled"],
) -> Fit:
    def run() -> curvfast.Factors:
        return curvfast.collect_from(
            model, batches, lambda name, _: name in layers, labels=labels, progress=False
        )

    def sums(found: curvfast.Factors) -> Moments:
        return {name: (found[name].a_sum, found[name].g_sum) for name in layers}

    return Fit(run, sums)
