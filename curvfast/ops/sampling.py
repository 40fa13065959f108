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


def refusal(logits: Tensor) -> str | None:
    """Return why torch cannot do this: it always can."""
    return None


def in_chunks(logits: Tensor, rows: Tensor | None, generator: torch.Generator) -> Tensor:
    """Draw and overwrite a few rows at a time, never more of them in float32."""
    count, classes = logits.shape
    labels = torch.full((count,), -1, dtype=torch.long, device=logits.device)
    index = torch.arange(count, device=logits.device) if rows is None else rows
    for chunk in index.split(max(1, _CHUNK_VALUES // classes)) if index.numel() else ():
        probabilities = logits[chunk].float().softmax(-1)
        drawn = draw(probabilities, generator)
        labels[chunk] = drawn[:, 0]
        logits[chunk] = minus_onehot_(probabilities, drawn).to(logits.dtype)
    if rows is not None:
        logits.masked_fill_((labels < 0)[:, None], 0)
    return labels


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a class of each row [rows, classes] by one uniform number; return them, int64 [rows, 1].

    The inverse of the distribution function, in float64: a row costs one random number, where
    ``torch.multinomial`` draws one for each class.
    """
    below = probabilities.double().cumsum_(-1)
    uniform = torch.rand(len(below), 1, dtype=below.dtype, device=below.device, generator=generator)
    # In (0, total]: what has no probability is never drawn. NaN passes every class.
    drawn = torch.searchsorted(below, (1 - uniform) * below[:, -1:])
    return drawn.clamp_(max=probabilities.shape[1] - 1)


def minus_onehot_(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Subtract 1 at each row's label [rows, 1], in place; return it."""
    return probabilities.scatter_add_(1, labels, torch.full_like(probabilities[:, :1], -1.0))
