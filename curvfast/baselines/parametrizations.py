"""Parametrizations of trial weights: fine-tuned ones, and straight-through binary masks.

W' = W ∘ m(s), where m drops the ``count`` entries of smallest |s| of a matrix. Backwards m is taken
for |s|: ∂L/∂s = ∂L/∂W' ∘ W ∘ sign(s) (Ramanujan et al., arXiv 1911.13299; Sakarvadia et al., arXiv
2410.02159).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from curvfast.baselines.baseline import ForgetModel, wide


def initial_scores(shape: torch.Size, d_in: int, generator: torch.Generator) -> Tensor:
    """Return scores uniform in ±1/√d_in, float32: Kaiming's initial values with a = √5."""
    return (2 * torch.rand(shape, generator=generator, dtype=torch.float32) - 1) / math.sqrt(d_in)


def without_smallest(weight: Tensor, keys: Tensor, count: int) -> Tensor:
    """Return ``weight`` with zeros at exactly the ``count`` smallest ``keys`` (of its shape).

    Everything else is copied bit for bit.
    """
    new = weight.flatten().clone()
    new[keys.flatten().topk(count, largest=False, sorted=False).indices] = 0
    return new.view(weight.shape)


def straight_through(gradient: Tensor, weight: Tensor, scores: Tensor) -> Tensor:
    """Return the gradient with respect to scores, given that with respect to the masked weight."""
    return gradient * weight * scores.sign()


class MaskedWeights:
    """Frozen weights without those of smallest |score|; SGD moves the scores.

    Scores, their gradients and momenta are float32: 12 bytes a weight.
    """

    def __init__(
        self,
        subject: ForgetModel,
        counts: Mapping[str, int],
        generator: torch.Generator,
        *,
        learning_rate: float,
        momentum: float,
        weight_decay: float,
    ) -> None:
        """Draw the scores.

        Args:
            subject: The model.
            counts: Number of weights to drop in each layer.
            generator: Generator of the scores, on the CPU: the same for every device.
            learning_rate: Of SGD.
            momentum: Of SGD.
            weight_decay: Of SGD.
        """
        self._frozen = subject.weights()
        self._counts = counts
        self._scores = {
            name: initial_scores(weight.shape, subject.layers[name].d_in, generator).to(
                device=weight.device, dtype=wide(weight)
            )
            for name, weight in self._frozen.items()
        }
        self._optimizer = torch.optim.SGD(
            self._scores.values(), lr=learning_rate, momentum=momentum, weight_decay=weight_decay
        )

    def weights(self) -> dict[str, Tensor]:
        """Return the weights, zero where they are dropped."""
        return {
            name: without_smallest(weight, self._scores[name].abs(), self._counts[name])
            for name, weight in self._frozen.items()
        }

    def step(self, found: Mapping[str, Tensor]) -> None:
        """Take a step of SGD along the straight-through gradient."""
        for name, scores in self._scores.items():
            scores.grad = straight_through(found[name], self._frozen[name], scores)
        self._optimizer.step()


class FreeWeights:
    """Float32 copies of the weights, trained by AdamW, and rounded to the layers' dtypes when used.

    They take 16 bytes a weight.
    """

    def __init__(self, subject: ForgetModel, *, learning_rate: float, weight_decay: float) -> None:
        """Start from the model's own weights."""
        own = subject.weights()
        self._dtypes = {name: weight.dtype for name, weight in own.items()}
        self._copies = {n: w.to(wide(w), copy=True) for n, w in own.items()}
        self._optimizer = torch.optim.AdamW(
            self._copies.values(), lr=learning_rate, weight_decay=weight_decay
        )

    def weights(self) -> dict[str, Tensor]:
        """Return the copies in the stored dtypes."""
        return {name: copy.to(self._dtypes[name]) for name, copy in self._copies.items()}

    def step(self, found: Mapping[str, Tensor]) -> None:
        """Take a step of AdamW."""
        for name, copy in self._copies.items():
            copy.grad = found[name]
        self._optimizer.step()
