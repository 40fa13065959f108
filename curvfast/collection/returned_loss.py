"""The loss a model returned: its value, and the factor by which the caller's loop multiplies it.

A loop divides its model's loss by accumulation steps and multiplies it by processes and by AMP's
scale. The gradient that arrives at that loss is the product of all these factors, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

WIDTH = 2
"""Length of :meth:`ReturnedLoss.vector`."""


class ReturnedLoss:
    """The loss that one call of a model returned, watched until its gradient arrives."""

    def __init__(self, loss: Tensor) -> None:
        """Watch the gradient of ``loss``, a scalar that requires grad."""
        # A copy: the loop may scale the loss in place.
        self._value = loss.detach().to(torch.float64, copy=True).reshape(())
        self._gradient: Tensor | None = None
        self._read: tuple[float, float] | None = None
        loss.register_hook(self._see)

    def vector(self) -> Tensor | None:
        """Return (factor, value), float64 [2] on the device; None before the gradient came."""
        if self._gradient is None:
            return None
        return torch.stack([self._gradient, self._value])

    def take(self, factor: float, value: float) -> None:
        """Take what :meth:`vector` held, read with other figures in one transfer."""
        self._read = factor, value

    @property
    def factor(self) -> float | None:
        """What the loop multiplied the loss by; None before the gradient came."""
        return None if self._figures is None else self._figures[0]

    @property
    def value(self) -> float | None:
        """The loss as the model returned it; None before the gradient came."""
        return None if self._figures is None else self._figures[1]

    @property
    def _figures(self) -> tuple[float, float] | None:
        if self._read is None:
            vector = self.vector()
            if vector is not None:
                factor, value = vector.tolist()
                self.take(factor, value)
        return self._read

    def _see(self, gradient: Tensor) -> None:
        # A second backward, through a kept graph, is of no other factor.
        if self._gradient is None:
            self._gradient = gradient.detach().double().sum()


class MeanLoss:
    """The mean loss per label of the batches that were counted."""

    def __init__(self) -> None:
        """Start without batches."""
        self._sum, self._labels = 0.0, 0.0

    def add(self, loss: ReturnedLoss, unit: float, labels: int | None) -> None:
        """Add the loss of one batch.

        Args:
            loss: As the model returned it, its gradient there.
            unit: Factor from a gradient of the batch to that of the summed loss.
            labels: The call's own number of labels; None takes those the unit is of.
        """
        if loss.factor is None or loss.value is None:
            return
        summed_over = unit * loss.factor
        self._sum += loss.value * summed_over
        self._labels += summed_over if labels is None else labels

    def value(self) -> float | None:
        """Return the mean per label so far, or None before the first batch."""
        return self._sum / max(1.0, self._labels) if self._labels else None


def returned_loss(output: Any) -> ReturnedLoss | None:
    """Watch the loss in a model's output: ``loss`` of a mapping, or the first or only scalar.

    Returns:
        None where there is none that requires grad.
    """
    if isinstance(output, Mapping):
        candidates = [output.get("loss")]
    elif isinstance(output, list | tuple):
        candidates = list(output)
    else:
        candidates = [output]
    for loss in candidates:
        if isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1:
            return ReturnedLoss(loss)
    return None
