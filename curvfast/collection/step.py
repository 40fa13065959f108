"""One measured batch of a frozen model: forward, labels, and activation gradients.

With labels drawn from the model's own predictive distribution the second moment of g is the true
Fisher; with given labels it is the empirical Fisher (arXiv 2510.24256; Kunstner et al., 2019).
For cross-entropy the gradient is softmax(logits) - onehot(label): no loss, no graph over the
vocabulary, and never more than a few rows of probabilities in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvfast import ops
from curvfast.errors import InputError
from curvfast.model.batch import Batch, read_call
from curvfast.model.forward import logits_of, model_arguments
from curvfast.model.rows import IGNORED_LABEL, AllRows, Rows

_CHUNK_VALUES = 1 << 19
# What may end a model's head without keeping its output for the backward.
_FORGETFUL = (
    "AddmmBackward0", "BmmBackward0", "LinearBackward0", "MmBackward0", "ReshapeAliasBackward0",
    "ToCopyBackward0", "UnsafeViewBackward0", "ViewBackward0",
)  # fmt: skip


def sampled_gradient(logits: Tensor, rows: Rows, generator: torch.Generator) -> tuple[Tensor, int]:
    """Draw a label for every row that counts, from softmax(logits); return the gradient.

    Args:
        logits: [..., classes], any float dtype. Overwritten by the gradient where the backward
            needs its values no more.
        rows: Which of the flattened leading dimensions count.
        generator: Draws the labels; on the device of ``logits``.

    Returns:
        The gradient, of the shape and dtype of ``logits`` and zero in rows that do not count; and
        the number of labels.
    """
    values = _own_values(logits)
    flat = values.flatten(0, -2)  # [rows, classes]
    index = None if isinstance(rows, AllRows) else rows.indices(flat.device)
    ops.sampled_gradient_(flat, index, generator)
    return values, rows.count


def label_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Return the gradient for given labels.

    Args:
        logits: [..., classes], any float dtype. Overwritten as by :func:`sampled_gradient`.
        labels: int64, the leading shape of ``logits``; -100 where there is none.

    Returns:
        The gradient, of the shape and dtype of ``logits`` and zero without a label; and the number
        of labels.
    """
    values, targets = _own_values(logits), labels.flatten()
    flat = values.flatten(0, -2)  # [rows, classes]
    absent = (targets == IGNORED_LABEL).nonzero().squeeze(1)  # [rows without a label]
    safe = targets.index_fill(0, absent, 0)[:, None]  # [rows, 1]
    step = max(1, _CHUNK_VALUES // flat.shape[1])
    for rows, own in zip(flat.split(step), safe.split(step), strict=True):
        rows.copy_(ops.minus_onehot_(rows.softmax(-1, dtype=torch.float32), own))
    flat.index_fill_(0, absent, 0)
    return values, len(targets) - len(absent)


def fisher_gradient(logits: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random gradient whose second moment is that of p - onehot(y), y drawn from p.

    It is √p∘z - p (√p·z), z independent random signs, so E[ggᵀ] = diag(p) - ppᵀ: of a certain
    prediction nearly every label drawn gives a gradient near zero, while all signs give some.
    Source: Martens, Sutskever and Swersky, arXiv 1206.6464.

    Args:
        logits: [..., classes], any float dtype.
        targets: int64, the leading shape of ``logits``; where it is -100 the gradient is zero.
        generator: Draws the signs, on the CPU.

    Returns:
        The gradient of the summed loss, of the shape and dtype of ``logits``.
    """
    p = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    signs = 2 * torch.randint(0, 2, p.shape, generator=generator, device="cpu") - 1  # z
    spread = p.sqrt() * signs.to(p)  # √p∘z: [..., classes]
    gradient = spread - p * spread.sum(-1, keepdim=True)
    return gradient.masked_fill_(targets.eq(IGNORED_LABEL)[..., None], 0).to(logits.dtype)


def _own_values(logits: Tensor) -> Tensor:
    """Return the values of logits, contiguous, to be written to: a copy where they are needed."""
    values = logits.detach()
    if type(logits.grad_fn).__name__ in _FORGETFUL and values.is_contiguous():
        return values
    return values.clone(memory_format=torch.contiguous_format)


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
        rows = _label_rows(arguments, logits, causal)
        gradient, count = sampled_gradient(logits, rows, generator)
    else:
        gradient, count = label_gradient(logits, gold_labels(arguments, gold, logits, causal))
    if edge is None:
        # Nothing that is measured was called: of some experts alone, none may get a token.
        return count
    # The backward needs the node, not the values: a vocabulary's worth of logits is freed first.
    del logits
    torch.autograd.backward((edge,), (gradient,))
    return count


def backward_edge(logits: Tensor) -> GradientEdge:
    """Return where the backward of logits starts; it holds the graph, and no values.

    To be taken before they are written to: of a view that is, autograd makes the node anew, without
    its hooks.
    """
    return get_gradient_edge(logits)


def _label_rows(arguments: Mapping[str, Any], logits: Tensor, causal: bool) -> Rows:
    """Return the flattened positions whose prediction is scored."""
    batch = Batch(skip_last=causal)
    read_call(batch, arguments)
    return batch.rows("the model's logits", _matching(batch, logits), logits.device)


def _matching(batch: Batch, logits: Tensor) -> torch.Size:
    shape = logits.shape[:-1]
    if len(shape) == 1:
        # One prediction a sequence or image: which of its positions count does not matter.
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
    shifted = torch.full_like(gold, IGNORED_LABEL)  # [sequences, length]
    shifted[:, :-1] = gold[:, 1:]  # position t predicts label t + 1
    rows = _label_rows(arguments, logits, causal)
    if not isinstance(rows, AllRows):
        scored = torch.zeros(shifted.numel(), dtype=torch.bool, device=shifted.device)
        scored[rows.indices(shifted.device)] = True
        shifted = shifted.masked_fill(~scored.view(shifted.shape), IGNORED_LABEL)
    return shifted
