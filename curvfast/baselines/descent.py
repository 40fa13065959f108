"""Step by step down a loss, with trial weights: the model's own are not touched on the way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Protocol

from torch import Tensor

from curvfast.baselines.rival import Losses
from curvfast.baselines.subject import Subject
from curvfast.baselines.trial import Term, gradients
from curvfast.errors import NonFiniteError
from curvfast.progress import Bar
from curvfast.steps import frozen


class Form(Protocol):
    """Trial weights, and how a gradient moves them."""

    def weights(self) -> dict[str, Tensor]:
        """Return the weights by layer, in the stored shape and dtype."""

    def move(self, found: Mapping[str, Tensor]) -> None:
        """Take a step, given the gradient of the loss with respect to the weights."""


def descend(
    subject: Subject,
    form: Form,
    steps: Iterator[Sequence[Term]],
    count: int,
    *,
    progress: bool,
) -> Losses:
    """Take ``count`` steps.

    Args:
        subject: The model; dropout is off meanwhile.
        form: The weights it is tried with.
        steps: The loss of each step: a term of memorized rows and, where there are any, one of
            clean rows.
        count: Of steps, at least 1.
        progress: Whether a bar counts them.

    Returns:
        The losses before each step.

    Raises:
        NonFiniteError: If one is NaN or infinite.
    """
    history: list[list[float]] = []
    with frozen(subject.model, False), Bar("forget", count, "step", progress) as bar:
        for number, terms in enumerate(islice(steps, count), 1):
            found, losses = gradients(subject, form.weights(), terms)
            if not all(math.isfinite(loss) for loss in losses):
                raise NonFiniteError(
                    f"the losses are {losses} at step {number} of {count}, so no weight was "
                    "written; lower the learning rate or the number of epochs"
                )
            form.move(found)
            history.append(losses)
            bar.advance(1, memorized=f"{losses[0]:.3f}")
    memorized, *clean = zip(*history, strict=True)
    return memorized, clean[0] if clean else ()
