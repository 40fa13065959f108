"""Greedy: zero, one by one, the weight with the largest first-order gain; slow.

Maini et al., "Can Neural Network Memorization Be Localized?", 2023, arXiv 2307.09542; for language
models Sakarvadia et al., ICLR 2025, arXiv 2410.02159.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from curvfast.baselines.baseline import ForgetModel, ForgetTask, Supervised, Trained
from curvfast.baselines.checks import check_clean_weight, check_ratio, check_reading
from curvfast.baselines.training import balanced_steps, descend
from curvfast.errors import InputError


@dataclass(frozen=True)
class Greedy(Supervised):
    """Zeroes the weights with the largest w · ∂L/∂w over all layers, recomputed after each step.

    L = −(1 − w) · CE(memorized) + w · CE(clean); to first order, zeroing a weight lowers L by
    w · ∂L/∂w. Where no weight would lower it, nothing is zeroed.
    """

    ratio: float = 0.001
    """Share of all weights that is zeroed at most, in (0, 1)."""
    at_once: int = 1
    """Weights zeroed for each gradient; 1 is the paper's, at a forward and backward a weight."""
    clean_weight: float = 0.5
    """w, in [0, 1); 0 needs no clean text."""
    batch_size: int = 32
    """Rows of each set for a gradient, at most."""
    scored: str = "all"
    """Which tokens of a memorized passage count: ``"all"``, or ``"suffix"``."""

    def __post_init__(self) -> None:
        """Check the hyper-parameters.

        Raises:
            InputError: If one is out of range.
        """
        check_ratio(self.ratio)
        check_reading(self.batch_size, self.scored)
        check_clean_weight(self.clean_weight)
        if self.at_once < 1:
            raise InputError(f"at_once={self.at_once}: pass a positive number of weights")

    def _balanced(self) -> bool:
        return self.clean_weight > 0

    def _train(self, task: ForgetTask) -> Trained:
        total = sum(weight.numel() for weight in task.subject.weights().values())
        count = round(self.ratio * total)
        if not count:
            raise InputError(f"ratio={self.ratio} of {total} weights is none; raise it")
        form = ZeroedWeights(task.subject, count, self.at_once)
        steps = balanced_steps(
            task, self.batch_size, task.seed, forget=self.clean_weight - 1, keep=self.clean_weight
        )
        return descend(task, form, steps, -(-count // self.at_once))


class ZeroedWeights:
    """Trial weights of which every step zeroes those with the largest first-order gain."""

    def __init__(self, subject: ForgetModel, count: int, at_once: int) -> None:
        """Start from the model's own weights; zero at most ``count``, ``at_once`` a step."""
        self._weights = {name: weight.clone() for name, weight in subject.weights().items()}
        self._left = count
        self._at_once = at_once

    def weights(self) -> dict[str, Tensor]:
        """Return the weights."""
        return self._weights

    def step(self, found: Mapping[str, Tensor]) -> None:
        """Zero where w · ∂L/∂w is largest and positive, over all layers."""
        weights = self._weights.values()
        device = next(iter(found.values())).device
        gains = torch.cat(
            [(weight * found[name]).flatten().to(device) for name, weight in self._weights.items()]
        )
        best = gains.topk(min(self._left, self._at_once))
        zero = torch.zeros_like(gains, dtype=torch.bool)
        zero[best.indices] = best.values > 0
        parts = zero.split([weight.numel() for weight in weights])
        for weight, part in zip(weights, parts, strict=True):
            weight.masked_fill_(part.view(weight.shape).to(weight.device), 0)
        self._left -= len(best.values)
