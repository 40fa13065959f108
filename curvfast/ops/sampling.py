"""The gradient of the summed loss for labels drawn from the model's own predictions."""

from __future__ import annotations

import torch
from torch import Tensor

from curvfast.errors import ShapeError
from curvfast.ops import registry

_CHUNK_VALUES = 1 << 19


def sampled_gradient_(logits: Tensor, rows: Tensor | None, generator: torch.Generator) -> Tensor:
    """Draw y ~ softmax(logits) for the rows that count; overwrite logits by softmax - onehot(y).

    Args:
        logits: [rows, classes], any float dtype. Written: the gradient of the summed cross-entropy,
            zero in rows that do not count.
        rows: int64 indices of the rows that count, or None for all.
        generator: Draws the labels; on the device of ``logits``.

    Returns:
        The labels, int64 [rows]; -1 in rows that do not count.

    Raises:
        ShapeError: If ``logits`` is not two-dimensional.
        BackendUnavailable: If a backend was named that cannot do this.
    """
    if logits.dim() != 2:
        raise ShapeError(f"logits must be [rows, classes], got {list(logits.shape)}")
    labels: Tensor = registry.resolve("sampled_gradient_", logits)(logits, rows, generator)
    return labels


def in_chunks(logits: Tensor, rows: Tensor | None, generator: torch.Generator) -> Tensor:
    """Draw and overwrite a few rows at a time, never more of them in float32."""
    count, classes = logits.shape
    numbers = torch.rand(
        count if rows is None else len(rows), 1, dtype=torch.float64, device=logits.device,
        generator=generator,
    )  # fmt: skip
    if rows is not None:
        numbers = numbers.new_zeros(count, 1).index_copy_(0, rows, numbers)
    labels = torch.empty(count, 1, dtype=torch.long, device=logits.device)
    step = max(1, _CHUNK_VALUES // classes)
    for values, uniform, label in zip(
        logits.split(step), numbers.split(step), labels.split(step), strict=True
    ):
        probabilities = values.softmax(-1, dtype=torch.float32)
        label.copy_(draw(probabilities, uniform))
        values.copy_(minus_onehot_(probabilities, label))
    if rows is not None:
        absent = torch.ones(count, dtype=torch.bool, device=logits.device).index_fill_(0, rows, 0)
        index = absent.nonzero().squeeze(1)
        logits.index_fill_(0, index, 0)
        labels.index_fill_(0, index, -1)
    return labels.squeeze(1)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Return a class of each row [rows, classes] by its uniform number [rows, 1], int64 [rows, 1].

    The inverse of the distribution function, in float64: a row costs one random number, where
    ``torch.multinomial`` draws one for each class.
    """
    below = probabilities.double().cumsum_(-1)
    # In (0, total]: what has no probability is never drawn. NaN passes every class.
    drawn = torch.searchsorted(below, (1 - uniform) * below[:, -1:])
    return drawn.clamp_(max=probabilities.shape[1] - 1)


def minus_onehot_(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Subtract 1 at each row's label [rows, 1], in place; return it."""
    return probabilities.scatter_add_(1, labels, torch.full_like(probabilities[:, :1], -1.0))
