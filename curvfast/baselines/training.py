"""Training of trial weights: forward and backward, the loop, and the loss of each step.

The weights are substituted during a call (``torch.func.functional_call``): no module is swapped,
nothing of the model is written, and no parameter gets a gradient. The backward runs inside that
call: a checkpointed region recomputes its forward there, with the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from curvfast.baselines.baseline import ForgetModel, ForgetTask, Trained, wide
from curvfast.baselines.examples import TokenBatch, drawn
from curvfast.display import Bar
from curvfast.errors import InputError, NonFiniteError
from curvfast.model.families import ExpertLayer
from curvfast.model.forward import forward_of, frozen, logits_of
from curvfast.model.rows import IGNORED_LABEL

Result = TypeVar("Result")
Objective = Callable[[Tensor, TokenBatch], Tensor]
"""(log-likelihoods of a batch's rows, [rows]; the batch) -> a scalar."""


@dataclass(frozen=True, eq=False)
class Term:
    """A term of a loss: ``coefficient`` times ``objective`` on one batch."""

    batch: TokenBatch
    coefficient: float
    objective: Objective


def mean_loss(found: Tensor, batch: TokenBatch) -> Tensor:
    """Return the mean over rows of each row's mean cross-entropy; padding does not count.

    Args:
        found: Log-likelihood of each row, [rows].
        batch: The rows.
    """
    return -(found / batch.counts.to(found.device)).mean()


def log_likelihoods(
    subject: ForgetModel, weights: Mapping[str, Tensor], batch: TokenBatch
) -> Tensor:
    """Return log p of each row's scored tokens, each given those before it, [rows].

    Args:
        subject: The model.
        weights: Trial weights by layer, in the stored shape and dtype. Other layers keep the
            model's.
        batch: The rows.

    Returns:
        Float32, or float64 where the logits are.

    Raises:
        InputError: If the model does not return logits for every token.
    """
    return _standing_in(subject, weights, lambda: _log_likelihoods(subject, batch))


def gradients(
    subject: ForgetModel, weights: Mapping[str, Tensor], terms: Sequence[Term]
) -> tuple[dict[str, Tensor], list[float]]:
    """Return the gradient of a sum of terms, with one backward per term to save memory.

    Args:
        subject: The model, in a ``frozen`` block.
        weights: The point of the gradient: weights by layer, as in :func:`log_likelihoods`.
        terms: The terms of the loss.

    Returns:
        The gradient by layer, float32 (float64 of float64 weights); and for each term its batch's
        :func:`mean_loss`.

    Raises:
        InputError: If the model does not return logits for every token.
    """
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    total = {name: torch.zeros_like(leaf, dtype=wide(leaf)) for name, leaf in leaves.items()}
    losses = []
    for term in terms:

        def differentiate(term: Term = term) -> tuple[Tensor, Sequence[Tensor]]:
            found = _log_likelihoods(subject, term.batch)
            loss = term.coefficient * term.objective(found, term.batch)
            # A layer that is never called has no gradient.
            parts = torch.autograd.grad(
                loss, list(leaves.values()), allow_unused=True, materialize_grads=True
            )
            return found.detach(), parts

        with torch.enable_grad():
            found, parts = _standing_in(subject, leaves, differentiate)
        for name, part in zip(leaves, parts, strict=True):
            total[name] += part
        losses.append(float(mean_loss(found, term.batch)))
    return total, losses


class _Within(nn.Module):
    """A module that holds the model, so that ``functional_call`` can run any function around it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[], Result]) -> Result:
        return run()


def _standing_in(
    subject: ForgetModel, weights: Mapping[str, Tensor], run: Callable[[], Result]
) -> Result:
    """Return the result of ``run`` while ``weights`` replace those of the model."""
    around = _Within(subject.model)
    parameters = {f"model.{name}": value for name, value in _parameters(subject, weights).items()}
    found: Result = functional_call(around, parameters, (run,))
    return found


def _log_likelihoods(subject: ForgetModel, batch: TokenBatch) -> Tensor:
    model = subject.model
    tokens = batch.tokens.to(subject.device)
    arguments: dict[str, Any] = {"input_ids": tokens}
    if not bool(batch.mask.all()):
        arguments["attention_mask"] = batch.mask.long().to(subject.device)
    logits = logits_of(model(**arguments, **forward_of(model).uncached))
    if logits.shape[:-1] != tokens.shape:
        raise InputError(
            f"the model's logits are {list(logits.shape)} for tokens {list(tokens.shape)}; pass a "
            "causal language model"
        )
    targets = batch.targets[:, 1:].to(logits.device)
    predicted = logits[:, :-1].flatten(0, 1).to(wide(logits))
    losses = cross_entropy(
        predicted, targets.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
    )
    return -losses.view(targets.shape).sum(1)


def _parameters(subject: ForgetModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole parameters by full name, with ``weights`` inserted."""
    names = {id(parameter): name for name, parameter in subject.model.named_parameters()}
    found: dict[str, Tensor] = {}
    stacks: dict[str, list[Tensor]] = {}
    for layer, weight in weights.items():
        place = subject.layers[layer]
        name = names[id(place.parameter)]
        if isinstance(place, ExpertLayer):
            stack = stacks.setdefault(name, list(place.parameter.detach()))
            stack[place.expert] = weight
        else:
            found[name] = weight
    return found | {name: torch.stack(stack) for name, stack in stacks.items()}


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


def generators(seed: int) -> tuple[torch.Generator, torch.Generator, torch.Generator]:
    """Return independent generators for initial values, memorized rows and clean rows."""
    parent = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**62, (3,), generator=parent).tolist()
    first, second, third = (torch.Generator().manual_seed(own) for own in seeds)
    return first, second, third


def balanced_steps(
    task: ForgetTask,
    size: int,
    seed: int,
    *,
    forget: float,
    keep: float,
    objective: Objective = mean_loss,
) -> Iterator[list[Term]]:
    """Yield steps without end: ``forget`` · objective(memorized) + ``keep`` · mean loss(clean).

    Each step has rows of both sets, so neither mean is empty; the smaller set is repeated more
    often.

    Args:
        task: The examples to draw from.
        size: Rows of each set in a step, at most.
        seed: Seed of the order.
        forget: Coefficient of the memorized rows' objective.
        keep: Coefficient of the clean rows' loss, where there are any.
        objective: Objective of the memorized rows, by default the per-sample mean cross-entropy.
    """
    _, order, clean_order = generators(seed)
    clean = drawn(task.clean, size, clean_order) if task.clean else None
    for batch in drawn(task.memorized, size, order):
        terms = [Term(batch, forget, objective)]
        if clean is not None:
            terms.append(Term(next(clean), keep, mean_loss))
        yield terms
