"""One measured batch of a frozen model: forward, labels, and activation gradients.

Labels are drawn from the likelihood of the model's head (true Fisher), given by the batch
(empirical Fisher), or summed over exactly; no loss is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvfast.collection.head import Said, likelihood_of, made_axis
from curvfast.collection.likelihood import SOFTMAX, Likelihood
from curvfast.collection.targets import LabelMask, Targets, read_targets, scored_rows
from curvfast.errors import InputError
from curvfast.model.forward import input_device, logits_of, model_arguments
from curvfast.model.identity import unwrap
from curvfast.model.rows import IGNORED_LABEL, AllRows

SAMPLED, GOLD, EXACT = "sampled", "gold", "exact"
LABELS = (SAMPLED, GOLD, EXACT)


class Told(Protocol):
    """A measurement that is told of a batch before its forward."""

    def expect(self, targets: Tensor | None, *, backwards: bool) -> None:
        """Note the labels of the next call, and whether several backwards run through it."""


@dataclass(eq=False)
class Asked:
    """What labels are asked for, and what the first batch showed of the head."""

    labels: str
    """One of :data:`LABELS`."""
    causal: bool
    """Whether position t predicts the label at t + 1."""
    said: Said = Said()  # noqa: RUF009
    """What the caller says of the head."""
    label_mask: LabelMask | None = None
    """Where labels are wanted."""
    likelihood: Likelihood | None = None
    """Found in the first batch, and the same in all."""


def run_step(
    model: nn.Module,
    batch: Any,
    asked: Asked,
    generator: torch.Generator,
    measurement: Told | None = None,
) -> int:
    """Run one batch forward and backward; nothing of it outlives the call.

    Args:
        model: In a :func:`frozen` block.
        batch: Keyword arguments of the model, or the tensor that is its one argument.
        asked: Which labels; the likelihood is noted there.
        generator: Draws the labels.
        measurement: Told of the labels before the forward.

    Returns:
        How many labels there were.

    Raises:
        InputError: If the batch, the model's output or the labels are of no use.
    """
    arguments = model_arguments(model, batch, input_device(model))
    targets = _take_targets(model, batch, arguments, asked)
    if measurement is not None:
        known = targets.known(classes=asked.likelihood is None or asked.likelihood.name == SOFTMAX)
        measurement.expect(known, backwards=asked.labels == EXACT)
    with torch.enable_grad():
        logits = logits_of(called(model, arguments))
    edge = backward_edge(logits) if logits.requires_grad else None
    if isinstance(batch, Mapping):
        # Where labels go is found on the tensors as they were given: from the host, without a wait.
        arguments |= {k: v for k, v in batch.items() if k in arguments}
    gradients, count = _gradients(model, arguments, targets, logits, asked, generator)
    if edge is None:
        # Nothing that is measured was called: of some experts alone, none may get a token.
        return count
    # The backward needs the node, not the values: a vocabulary's worth of logits is freed first.
    del logits
    while gradients:
        gradient = gradients.pop()
        torch.autograd.backward((edge,), (gradient,), retain_graph=bool(gradients))
    return count


def call_arguments(model: nn.Module, batch: Any, asked: Asked) -> dict[str, Any]:
    """Return what a model is called with for a batch: without labels, a decoder's input made.

    Args:
        model: The model.
        batch: Keyword arguments of it, or the tensor that is its one argument.
        asked: Which labels are asked for.

    Raises:
        InputError: If the batch is neither.
    """
    arguments = model_arguments(model, batch, input_device(model))
    _take_targets(model, batch, arguments, asked)
    return arguments


def called(model: nn.Module, arguments: Mapping[str, Any]) -> Any:
    """Return a model's output.

    Raises:
        InputError: If an encoder-decoder got neither labels nor input for its decoder.
    """
    if not lacks_decoder_input(model, arguments) or "labels" in arguments:
        return model(**arguments)
    try:
        return model(**arguments)
    except ValueError as error:
        raise InputError(
            f"{type(unwrap(model)).__name__} is an encoder-decoder, and a batch has no input of "
            "its decoder: put 'labels' into every batch (they are shifted as the model itself "
            f"does), or 'decoder_input_ids'. The model said: {error}"
        ) from error


def _take_targets(model: nn.Module, batch: Any, arguments: dict[str, Any], asked: Asked) -> Targets:
    """Take the labels out of the arguments, and make a decoder's input of them."""
    labels = arguments.get("labels")
    ignored = getattr(getattr(unwrap(model), "config", None), "semantic_loss_ignore_index", None)
    targets = read_targets(batch, arguments, asked.label_mask, causal=asked.causal, ignored=ignored)
    if isinstance(labels, Tensor) and lacks_decoder_input(model, arguments):
        prepare = getattr(unwrap(model), "prepare_decoder_input_ids_from_labels", None)
        if callable(prepare):
            arguments["decoder_input_ids"] = prepare(labels=labels)
        else:
            # The model makes it itself, beside a loss that nobody reads.
            arguments["labels"] = labels
    return targets


def lacks_decoder_input(model: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Return whether a model generates by a decoder whose input is not among the arguments.

    Args:
        model: The model; a classifier on an encoder-decoder makes that input of its own.
        arguments: What it would be called with.
    """
    head: Any = unwrap(model)
    if not getattr(getattr(head, "config", None), "is_encoder_decoder", False):
        return False
    find = getattr(head, "get_output_embeddings", None)
    if not callable(find) or find() is None:
        return False
    given = (arguments.get(name) for name in ("decoder_input_ids", "decoder_inputs_embeds"))
    return all(value is None for value in given)


def _gradients(
    model: nn.Module,
    arguments: Mapping[str, Any],
    targets: Targets,
    logits: Tensor,
    asked: Asked,
    generator: torch.Generator,
) -> tuple[list[Tensor], int]:
    """Return the gradients of the outputs, one for each backward, and the number of labels."""
    if asked.likelihood is None:
        asked.likelihood = likelihood_of(
            model, logits.shape, targets.labels, _grids(arguments), asked.said, made_axis(logits)
        )
    likelihood = asked.likelihood
    if asked.labels == GOLD and targets.labels is None:
        targets = _next_tokens(arguments, targets, asked.causal)
    rows = scored_rows(
        arguments, targets, likelihood.predictions(logits.shape), logits.device,
        causal=asked.causal, decoder=_has_decoder_input(arguments),
        classes=likelihood.name == SOFTMAX,
    )  # fmt: skip
    if asked.labels == EXACT:
        return likelihood.exact(logits, rows), rows.count
    if asked.labels == SAMPLED:
        gradient, count = likelihood.sampled(logits, rows, generator)
        return [gradient], count
    labels = targets.labels
    if likelihood.name == SOFTMAX and not labels.is_floating_point():  # type: ignore[union-attr]
        labels = targets.known(classes=True)
    assert labels is not None
    gradient, count = likelihood.gold(logits, labels, rows)
    return [gradient], count


def _has_decoder_input(arguments: Mapping[str, Any]) -> bool:
    """Return whether predictions are at positions of a decoder, not at those of the source."""
    return any(
        arguments.get(name) is not None
        for name in ("decoder_input_ids", "decoder_inputs_embeds", "labels")
    )


def _next_tokens(arguments: Mapping[str, Any], targets: Targets, causal: bool) -> Targets:
    tokens = arguments.get("input_ids") if causal else None
    if not isinstance(tokens, Tensor):
        raise InputError(
            "a batch holds no 'labels', and they are not the next tokens of a causal model: put "
            "them into every batch, or where there is a choice pass labels='sampled'"
        )
    shifted = torch.full_like(tokens, IGNORED_LABEL)  # [sequences, length]
    shifted[:, :-1] = tokens[:, 1:]
    return Targets(shifted, targets.scored, targets.ignored)


def _grids(arguments: Mapping[str, Any]) -> list[torch.Size]:
    """Return the leading shapes of the model's input that its predictions may have."""
    grids = []
    for value in arguments.values():
        if not isinstance(value, Tensor):
            continue
        if value.dim() == 2 and not value.is_floating_point():
            grids.append(value.shape)
    if grids:
        return list(dict.fromkeys(grids))
    for value in arguments.values():
        if isinstance(value, Tensor) and value.dim() == 3:
            # [sequences, length, features], or [sequences, channels, length].
            grids += [value.shape[:2], value.shape[:1] + value.shape[2:]]
    return list(dict.fromkeys(grids))


def backward_edge(logits: Tensor) -> GradientEdge:
    """Return where the backward of logits starts; it holds the graph, and no values.

    To be taken before they are written to: of a view that is, autograd makes the node anew, without
    its hooks.
    """
    return get_gradient_edge(logits)


def gold_labels(
    arguments: Mapping[str, Any], gold: Tensor | None, logits: Tensor, causal: bool
) -> Tensor:
    """Return the label that each row of the logits predicts.

    Args:
        arguments: What the model was called with.
        gold: Labels of the batch, of the shape of the model's input where that is a sequence; None
            takes the next token of a causal model.
        logits: [..., classes].
        causal: Whether position t predicts the label at t + 1.

    Returns:
        int64, the leading shape of ``logits``; -100 where there is no label.

    Raises:
        InputError: If there are no labels.
    """
    if gold is None:
        targets = _next_tokens(arguments, Targets(None, None), causal)
    elif not causal:
        return gold
    else:
        targets = read_targets({"labels": gold}, {}, None, causal=True)
    assert targets.labels is not None
    rows = scored_rows(
        arguments, targets, logits.shape[:-1], logits.device, causal=causal, decoder=False,
        classes=True,
    )  # fmt: skip
    if isinstance(rows, AllRows):
        return targets.labels
    scored = torch.zeros(targets.labels.numel(), dtype=torch.bool, device=logits.device)
    scored[rows.indices(logits.device)] = True
    return targets.labels.masked_fill(~scored.view(targets.labels.shape), IGNORED_LABEL)
