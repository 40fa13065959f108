"""The scale of a model's returned loss, measured by the gradient that arrives at it.

A loop divides its model's loss by accumulation steps and multiplies it by processes and by AMP's
scale. The gradient that arrives at that loss is the product of all these factors, exactly, so G can
be of the summed loss although none of them is passed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from curvfast.errors import InputError
from curvfast.model.batch import Batch
from curvfast.model.rows import IGNORED_LABEL

# Predictions whose gradients show over how many labels a loss is a mean; one alone may be certain.
_PREDICTIONS = 16
# Departure from the gradient of a mean cross-entropy, in logits as coarse as bfloat16.
_DEPARTURE = 0.05


class ReturnedLosses:
    """The losses that a model returned during a measurement."""

    def __init__(self) -> None:
        """Start without losses."""
        # Weak: a loss goes with the batch it is of.
        self._of: WeakKeyDictionary[Batch, ReturnedLoss] = WeakKeyDictionary()
        self._sum: Tensor | None = None
        self._labels = 0

    def watch(self, batch: Batch, output: Any) -> None:
        """Record the loss in a model's output, if it has one that requires grad."""
        named = isinstance(output, Mapping)
        loss = output.get("loss") if named else output[0] if isinstance(output, tuple) else None
        if isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1:
            self._of[batch] = ReturnedLoss(loss, output.get("logits") if named else None, batch)

    def unit(self, batch: Batch, *, mean: bool) -> float:
        """Return the factor from a gradient to that of the summed loss.

        Args:
            batch: What the gradient belongs to.
            mean: Whether its loss is a mean over labels.

        Returns:
            The unit; not finite where the loop multiplied the loss by nothing that is.

        Raises:
            InputError: If the gradient is not of the loss the model returned, or over how many
                labels that is a mean cannot be determined.
        """
        loss = self._of.get(batch)
        if loss is None or loss.factor is None:
            raise InputError(
                "loss_scale=None reads the scale of the loss off the gradient that arrives at the "
                "loss the model returns, and a gradient came that did not pass through one. The "
                "likely cause is a loss made outside the model: transformers' Trainer makes one "
                "for compute_loss_func= and label_smoothing_factor=. Pass loss_scale=, the factor "
                "of the *mean* loss (1.0 for a mean over all labels of the step)"
            )
        if loss.unit is None:
            labels = loss.mean_over(batch) if mean else 1
            loss.unit = labels / loss.factor if loss.factor else math.inf
            self._sum = loss.value * labels + (0 if self._sum is None else self._sum)
            self._labels += labels if loss.own is None else loss.own
        return loss.unit

    def mean(self) -> float | None:
        """Return the mean loss per label so far, or None before the first gradient."""
        return None if self._sum is None else float(self._sum) / max(1, self._labels)


class ReturnedLoss:
    """The loss that one call of a model returned."""

    def __init__(self, loss: Tensor, logits: Any, batch: Batch) -> None:
        """Watch the gradients that arrive at it.

        Args:
            loss: A scalar that requires grad.
            logits: [..., classes], where the model returned them.
            batch: The batch of its call, with the number of its labels.
        """
        # A copy: the loop may scale the loss in place.
        self.value = loss.detach().to(torch.float32, copy=True)
        self.factor: float | None = None
        self.unit: float | None = None
        self.own = batch.own_labels()
        self._predictions: Tensor | None = None
        self._gradients: Tensor | None = None
        loss.register_hook(self._note_factor)
        if isinstance(logits, Tensor) and self.own is not None and self.own != batch.labels:
            self._watch_predictions(logits, batch)

    def mean_over(self, batch: Batch) -> int:
        """Return over how many labels this loss is a mean.

        Those of its call; or the ``num_items_in_batch`` it was given, which many models accept and
        pass over. Where they differ, the gradients of some predictions decide.

        Raises:
            InputError: If neither number explains those gradients.
        """
        given, own, gradients = batch.label_count(), self.own, self._gradients
        if own is None or own == given or gradients is None or not self.factor:
            return given
        if not gradients.any() or not torch.isfinite(gradients).all():
            return given
        assert self._predictions is not None
        share = _share_of_one_label(gradients.double() / self.factor, self._predictions.double())
        fitting = [n for n in (given, own) if abs(n * share - 1) <= _DEPARTURE]
        if not fitting:
            raise InputError(
                f"over how many labels the model's loss is a mean cannot be told: its call had "
                f"{own}, it was given num_items_in_batch={given}, and its gradient is that of no "
                "mean cross-entropy of its logits over either. Measure without gradient "
                "accumulation, or pass loss_scale="
            )
        return min(fitting, key=lambda n: abs(n * share - 1))

    def _note_factor(self, gradient: Tensor) -> None:
        self.factor = float(gradient.sum())

    def _watch_predictions(self, logits: Tensor, batch: Batch) -> None:
        targets = batch.targets
        if targets is None or targets.numel() != logits.shape[:-1].numel():
            return
        if not logits.requires_grad:
            return
        index = (targets != IGNORED_LABEL).flatten().nonzero().squeeze(1).to(logits.device)
        index = index[:: max(1, len(index) // _PREDICTIONS)]
        self._predictions = logits.detach().flatten(0, -2)[index]  # [predictions, classes]

        node, output = _origin(logits)

        def note(gradients: tuple[Tensor | None, ...]) -> None:
            gradient = gradients[output]
            if gradient is not None:
                self._gradients = gradient.detach().flatten(0, -2)[index]

        node.register_prehook(note)


def _origin(logits: Tensor) -> tuple[Node, int]:
    """Return the node that made ``logits`` and which of its outputs they are.

    Under mixed precision accelerate returns a float32 copy of the logits that made the loss.
    """
    edge = get_gradient_edge(logits)
    node, output = edge.node, edge.output_nr
    while node.name().startswith("ToCopyBackward"):
        source, number = node.next_functions[0]
        if source is None:
            break
        node, output = source, number
    return node, output


def _share_of_one_label(gradients: Tensor, logits: Tensor) -> float:
    """Return 1/n of a mean cross-entropy over n labels: its gradients are (p - e_y)/n.

    Args:
        gradients: Of the loss at ``logits``, both [predictions, classes].
        logits: What was predicted.

    Returns:
        0 if these are no such gradients.
    """
    scored = gradients.any(1)
    gradients, p = gradients[scored], logits[scored].softmax(1)
    p[torch.arange(len(p)), gradients.argmin(1)] -= 1
    share = (p * gradients).sum() / p.square().sum().clamp_min(1e-300)
    fits = (gradients - share * p).norm() <= _DEPARTURE * gradients.norm()
    return float(share) if fits else 0.0
