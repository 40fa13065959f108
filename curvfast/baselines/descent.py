"""Optimisation loop over trial weights; the model's weights are written once, at the end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Protocol

from torch import Tensor

from curvfast.baselines.rival import ForgetTask, Trained
from curvfast.baselines.trial import Term, gradients
from curvfast.errors import NonFiniteError
from curvfast.progress import Bar
from curvfast.steps import frozen


class Form(Protocol):
    """A parametrisation of trial weights with its optimiser."""

    def weights(self) -> dict[str, Tensor]:
        """Return the weights by layer, in the stored shape and dtype."""

    def step(self, found: Mapping[str, Tensor]) -> None:
        """Take an optimiser step, given the gradient of the loss with respect to the weights."""


def descend(task: ForgetTask, form: Form, steps: Iterator[Sequence[Term]], count: int) -> Trained:
    """Run ``count`` optimiser steps and write the final weights, all or none.

    Args:
        task: The model, run without dropout, and whether a bar counts the steps.
        form: The trial weights.
        steps: The loss of each step: a term of memorized rows and, where there are any, one of
            clean rows.
        count: Number of steps, at least 1.

    Returns:
        What changed, and the losses before each step.

    Raises:
        NonFiniteError: If a loss or a new weight is NaN or infinite.
    """
    subject = task.subject
    history: list[list[float]] = []
    with frozen(subject.model, False), Bar("forget", count, "step", task.progress) as bar:
        for number, terms in enumerate(islice(steps, count), 1):
            found, losses = gradients(subject, form.weights(), terms)
            if not all(math.isfinite(loss) for loss in losses):
                raise NonFiniteError(
                    f"the losses are {losses} at step {number} of {count}, so no weight was "
                    "written; lower the learning rate or the number of epochs"
                )
            form.step(found)
            history.append(losses)
            bar.advance(1, memorized=f"{losses[0]:.3f}")
    memorized, *clean = zip(*history, strict=True)
    return Trained(subject.commit(form.weights()), (memorized, clean[0] if clean else ()))
