"""The gradient of the summed loss with respect to the logits, for sampled or given labels.

With labels drawn from the model's own predictive distribution the second moment of g is the true
Fisher; with given labels it is the empirical Fisher (arXiv 2510.24256; Kunstner et al., 2019).
For cross-entropy the gradient is softmax(logits) - onehot(label): no loss, no graph over the
vocabulary, and never more than a few rows of probabilities in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from curvfast import ops
from curvfast.counted_rows import AllRows, Rows
from curvfast.rows import IGNORED_LABEL

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
    flat = values.flatten(0, -2)
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
    flat = values.flatten(0, -2)
    absent = (targets == IGNORED_LABEL).nonzero().squeeze(1)
    safe = targets.index_fill(0, absent, 0)[:, None]
    step = max(1, _CHUNK_VALUES // flat.shape[1])
    for rows, own in zip(flat.split(step), safe.split(step), strict=True):
        rows.copy_(ops.minus_onehot_(rows.softmax(-1, dtype=torch.float32), own))
    flat.index_fill_(0, absent, 0)
    return values, len(targets) - len(absent)


def fisher_gradient(logits: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random gradient whose second moment is that of p - onehot(y), y drawn from p.

    It is √p∘z - p (√p·z), z independent random signs, so E[ggᵀ] = diag(p) - ppᵀ: of a certain
    prediction labels drawn at random nearly all say nothing, and these signs all say a little.
    Source: Martens, Sutskever and Swersky, arXiv 1206.6464.

    Args:
        logits: [..., classes], any float dtype.
        targets: int64, the leading shape of ``logits``; where it is -100 the gradient is zero.
        generator: Draws the signs, on the CPU.

    Returns:
        The gradient of the summed loss, of the shape and dtype of ``logits``.
    """
    p = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    signs = 2 * torch.randint(0, 2, p.shape, generator=generator, device="cpu") - 1
    spread = p.sqrt() * signs.to(p)
    gradient = spread - p * spread.sum(-1, keepdim=True)
    return gradient.masked_fill_(targets.eq(IGNORED_LABEL)[..., None], 0).to(logits.dtype)


def _own_values(logits: Tensor) -> Tensor:
    """Return the values of logits, contiguous, to be written to: a copy where they are needed."""
    values = logits.detach()
    if type(logits.grad_fn).__name__ in _FORGETFUL and values.is_contiguous():
        return values
    return values.clone(memory_format=torch.contiguous_format)
