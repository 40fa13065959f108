"""Forward and backward of a model with trial weights, without writing them to the model.

The weights are substituted during a call (``torch.func.functional_call``): no module is swapped,
nothing of the model is written, and no parameter gets a gradient. The backward runs inside that
call: a checkpointed region recomputes its forward there, with the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from curvfast.adapters import ExpertLayer
from curvfast.baselines.examples import TokenBatch
from curvfast.baselines.subject import ForgetModel, wide
from curvfast.errors import InputError
from curvfast.forward import forward_of
from curvfast.rows import IGNORED_LABEL
from curvfast.steps import logits_of

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
