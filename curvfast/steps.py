"""One batch through a frozen model: forward, labels, and the gradients of activations alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from curvfast.errors import InputError
from curvfast.fisher import label_gradient, sampled_gradient
from curvfast.forward import forward_of
from curvfast.provenance import unwrap
from curvfast.rows import IGNORED_LABEL, Batch, read_call


def run_step(
    model: nn.Module,
    batch: Any,
    labels: str,
    causal: bool,
    generator: torch.Generator,
) -> int:
    """Run one batch forward and backward; nothing of it outlives the call.

    Args:
        model: In a :func:`frozen` block.
        batch: Keyword arguments of the model, or the tensor that is its one argument.
        labels: ``"sampled"`` or ``"gold"``.
        causal: Whether position t predicts the label at t + 1.
        generator: Draws the labels.

    Returns:
        How many labels there were.

    Raises:
        InputError: If the batch, the model's output or the labels are of no use.
    """
    arguments = model_arguments(model, batch, next(model.parameters()).device)
    gold = arguments.pop("labels", None)
    with torch.enable_grad():
        logits = logits_of(model(**arguments))
    edge = backward_edge(logits) if logits.requires_grad else None
    if labels == "sampled":
        index = _label_rows(arguments, logits, causal)
        gradient, count = sampled_gradient(logits, index, generator)
    else:
        gradient, count = label_gradient(logits, gold_labels(arguments, gold, logits, causal))
    if edge is None:
        # Nothing that is measured was called: of some experts alone, none may get a token.
        return count
    # The backward needs the node, not the values: a vocabulary's worth of logits is freed first.
    del logits
    torch.autograd.backward((edge,), (gradient,))
    return count


@contextmanager
def frozen(model: nn.Module, keep_mode: bool) -> Iterator[bool]:
    """Freeze the parameters for a while.

    Args:
        model: Its modes and ``requires_grad`` are as before afterwards.
        keep_mode: Whether it stays in its mode; otherwise it is in eval mode.

    Yields:
        Whether no activation is recomputed.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    modes = [(module, module.training) for module in model.modules()]
    handle: RemovableHandle | None = None
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        if not keep_mode:
            model.eval()
        checkpointing = model.training and getattr(
            unwrap(model), "is_gradient_checkpointing", False
        )
        if checkpointing:
            # A checkpointed region passes gradients on only if one of its inputs asks for them.
            embedding = unwrap(model).get_input_embeddings()  # type: ignore[operator]
            handle = embedding.register_forward_hook(lambda _m, _a, y: y.requires_grad_())
        yield not checkpointing
    finally:
        if handle is not None:
            handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode


def model_arguments(model: nn.Module, batch: Any, device: torch.device) -> dict[str, Any]:
    """Return what a model is called with for a batch, on a device and without a cache.

    Args:
        model: The model.
        batch: Keyword arguments of it, or the tensor that is its one argument.
        device: Where tensors are moved.

    Raises:
        InputError: If the batch is neither, or the one argument cannot be told.
    """
    forward = forward_of(model)
    if isinstance(batch, Tensor):
        batch = {forward.first(): batch}
    if not isinstance(batch, Mapping):
        raise InputError(
            f"a batch is a {type(batch).__name__}; pass keyword arguments of the model, such as "
            "{'input_ids': ..., 'attention_mask': ...}, or a tensor that is its one argument"
        )
    arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return {**forward.uncached, **arguments}


def logits_of(output: Any) -> Tensor:
    """Return the logits that a model's output is, or has.

    Raises:
        InputError: If there are none.
    """
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if not isinstance(found, Tensor):
        raise InputError(
            f"the model returned {type(output).__name__} without logits, so no label can be drawn; "
            "use the model with its head, or curvfast.collect() around a loop with its own loss"
        )
    return found


def backward_edge(logits: Tensor) -> GradientEdge:
    """Return where the backward of logits starts; it holds the graph, and no values.

    To be taken before they are written to: of a view that is, autograd makes the node anew, without
    its hooks.
    """
    return get_gradient_edge(logits)


def _label_rows(arguments: Mapping[str, Any], logits: Tensor, causal: bool) -> Tensor | None:
    """Return the flattened positions whose prediction is scored, or None for all."""
    batch = Batch(skip_last=causal)
    read_call(batch, arguments)
    return batch.rows("the model's logits", _matching(batch, logits), logits.device).index


def _matching(batch: Batch, logits: Tensor) -> torch.Size:
    shape = logits.shape[:-1]
    if len(shape) == 1:
        # One prediction a sequence or image: its positions say nothing about which count.
        batch.mask, batch.skip_last = None, False
    return shape


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
    if gold is None and causal:
        gold = arguments.get("input_ids")
    if gold is None:
        raise InputError(
            "a batch holds no 'labels', and they are not the next tokens of a causal model: put "
            "them into every batch, or where there is a choice pass labels='sampled'"
        )
    if not causal:
        return gold
    shifted = torch.full_like(gold, IGNORED_LABEL)
    shifted[:, :-1] = gold[:, 1:]
    index = _label_rows(arguments, logits, causal)
    if index is not None:
        scored = torch.zeros(shifted.numel(), dtype=torch.bool, device=shifted.device)
        scored[index] = True
        shifted = shifted.masked_fill(~scored.view(shifted.shape), IGNORED_LABEL)
    return shifted
