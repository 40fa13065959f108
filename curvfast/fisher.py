"""The gradient of the summed loss with respect to the logits, for sampled or given labels.

With labels drawn from the model's own predictive distribution the second moment of g is the true
Fisher; with given labels it is the empirical Fisher (arXiv 2510.24256; Kunstner et al., 2019).
For cross-entropy the gradient is softmax(logits) - onehot(label): no loss, no graph over the
vocabulary, and never more than a few rows of probabilities in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from curvfast.rows import IGNORED_LABEL

_CHUNK_VALUES = 1 << 19


def sampled_gradient(
    logits: Tensor, rows: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Draw a label for every row that counts, from softmax(logits); return the gradient.

    Args:
        logits: [..., classes], any float dtype.
        rows: Indices into the flattened leading dimensions that count, or None for all.
        generator: Draws the labels; on the device of ``logits``.

    Returns:
        The gradient, of the shape and dtype of ``logits`` and zero in rows that do not count; and
        the number of labels.
    """
    flat = logits.detach().flatten(0, -2)
    gradient, index = _start(flat, rows)
    for chunk in _chunks(index, flat.shape[1]):
        probabilities = flat[chunk].float().softmax(-1)
        labels = torch.multinomial(probabilities, 1, generator=generator)
        gradient[chunk] = _minus_onehot(probabilities, labels).to(flat.dtype)
    return gradient.view(logits.shape), index.shape[0]


def label_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Return the gradient for given labels.

    Args:
        logits: [..., classes], any float dtype.
        labels: int64, the leading shape of ``logits``; -100 where there is none.

    Returns:
        The gradient, of the shape and dtype of ``logits`` and zero without a label; and the number
        of labels.
    """
    flat, targets = logits.detach().flatten(0, -2), labels.flatten()
    gradient, index = _start(flat, (targets != IGNORED_LABEL).nonzero().squeeze(1))
    for chunk in _chunks(index, flat.shape[1]):
        probabilities = flat[chunk].float().softmax(-1)
        gradient[chunk] = _minus_onehot(probabilities, targets[chunk, None]).to(flat.dtype)
    return gradient.view(logits.shape), index.shape[0]


def _start(flat: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    index = torch.arange(flat.shape[0], device=flat.device) if rows is None else rows
    return torch.zeros_like(flat), index


def _chunks(index: Tensor, classes: int) -> tuple[Tensor, ...]:
    return index.split(max(1, _CHUNK_VALUES // classes)) if index.numel() else ()


def _minus_onehot(probabilities: Tensor, labels: Tensor) -> Tensor:
    return probabilities.scatter_add_(1, labels, torch.full_like(probabilities[:, :1], -1.0))
