"""Rows of logits whose gradient is looked at, chosen in the forward without a host wait."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvfast.collection.cross_entropy import NO_LABEL, Labels, evenly, measure
from curvfast.ops import devices

# Rows that are read, at least and at most: of few classes more, so that rare ones are among them.
_ENTRIES, FEWEST, _MOST = 1 << 13, 16, 256
# Rows that are read one by one where no device has to be waited for.
_VIEWS = 128
# Candidates for each of them: a loss may leave rows out that no label says.
_CANDIDATES = 4
# Candidates among rows whose label is ignored: a term other than the likelihood is seen there.
_UNLABELLED = 16


@dataclass(frozen=True, eq=False)
class CandidateRows:
    """Candidate rows of logits, their classes on one axis, copied in the forward."""

    axis: int
    index: Tensor
    """int64 [k], into the flattened shape without the class axis."""
    exists: Tensor
    """Bool [k]."""
    logits: Tensor
    """[k, C]."""
    labels: Labels | None
    soft: Tensor | None
    """Probabilities as labels, [k, C]."""
    complete: bool
    """Whether every row is among them."""

    @property
    def wanted(self) -> int:
        """How many rows with a gradient are read."""
        return rows_read(self.logits.shape[1])

    def measure(self, gradient: Tensor) -> Tensor:
        """Return the vector of a gradient of the logits' shape."""
        g = take_rows(gradient, self.axis, self.index)
        return measure(self.logits, g, self.exists, self.wanted, self.labels, self.soft)


def candidate_rows(
    logits: Tensor,
    labels: Tensor | None,
    input_ids: Tensor | None,
    *,
    shifted: bool,
) -> tuple[list[CandidateRows], Tensor | None]:
    """Return rows of logits, for each axis that may hold the classes, and the numbers of labels.

    Args:
        logits: [..., C] or [N, C, ...].
        labels: Integers, negative where there is none; or probabilities of the logits' shape.
        input_ids: Tokens, which take the labels' place where there are none.
        shifted: Whether ``labels`` are those of the next position already.

    Returns:
        The likelier axis first; and where the labels fit, the number of them, all and without the
        first of each sequence, float64 [2] on the device.
    """
    soft = labels if labels is not None and labels.is_floating_point() else None
    if soft is not None and soft.shape != logits.shape:
        soft = None
    hard = labels if labels is not None and not labels.is_floating_point() else None
    chosen, counts = [], None
    for axis in _class_axes(logits.shape, hard):
        shape = _without(logits.shape, axis)
        known = None if hard is None else _aligned(hard, shape, logits.device, shifted=shifted)
        hints = known
        if known is None and input_ids is not None:
            hints = _aligned(input_ids, shape, logits.device, shifted=False)
        chosen.append(_candidates(logits, axis, known, hints, soft))
        if known is not None:
            assert hard is not None
            counts = _counts(hard, logits.device, shifted=shifted)
    return chosen, counts


def rows_read(classes: int) -> int:
    """Return how many rows with a gradient are read."""
    return min(max(_ENTRIES // classes, FEWEST), _MOST)


def _without(shape: torch.Size, axis: int) -> torch.Size:
    return torch.Size([n for d, n in enumerate(shape) if d != axis % len(shape)])


def _class_axes(shape: torch.Size, labels: Tensor | None) -> list[int]:
    """Return the axes that may hold the classes, the likelier first."""
    last = len(shape) - 1
    axes = [axis for axis in dict.fromkeys((last, 1)) if shape[axis] > 1]
    if labels is None or len(axes) == 1:
        return axes
    fitting = [axis for axis in axes if _without(shape, axis) == labels.shape]
    return fitting or [axis for axis in axes if _fits(labels, _without(shape, axis))] or axes


def _fits(labels: Tensor, shape: torch.Size) -> bool:
    """Return whether rows [*shape] are positions of ``labels``, or the first or last of them."""
    if labels.numel() == shape.numel():
        return True
    return labels.dim() == len(shape) >= 2 and labels.shape[:-1] == shape[:-1]


def _aligned(
    labels: Tensor, shape: torch.Size, device: torch.device, *, shifted: bool
) -> Labels | None:
    """Return the labels of all rows [*shape], flattened; None where they are of other rows."""
    if labels.is_floating_point() or labels.is_complex() or not _fits(labels, shape):
        return None
    labels = labels.detach().to(device, torch.int64, non_blocking=True)
    labels = labels.where(labels >= 0, NO_LABEL)
    if labels.numel() == shape.numel() and labels.dim() < 2:
        return Labels(labels.flatten(), torch.full_like(labels, NO_LABEL).flatten())
    rows = shape[-1] if labels.dim() == len(shape) else labels.shape[-1]
    behind = labels.shape[-1] - rows
    columns = [_from(labels, behind - shifted + step, rows).flatten() for step in (0, 1)]
    if behind != 1:
        return Labels(columns[0], columns[1])
    # One position fewer: the first ones, or the last; their labels are told apart by the gradient.
    first = _from(labels, -int(shifted), rows).flatten()
    return Labels(first, columns[0], columns[1])


def _from(labels: Tensor, start: int, length: int) -> Tensor:
    """Return ``labels[..., start : start + length]``, :data:`NO_LABEL` beyond their ends."""
    ends = (-start, start + length - labels.shape[-1])
    return torch.nn.functional.pad(labels, ends, value=NO_LABEL)


def _counts(labels: Tensor, device: torch.device, *, shifted: bool) -> Tensor:
    """Return the number of labels, all and without the first of each sequence, float64 [2]."""
    known = labels.detach() >= 0
    ahead = known[..., 1:] if labels.dim() >= 2 and not shifted else known
    counts = torch.stack([known.sum(), ahead.sum()]).double()
    return counts.to(device, non_blocking=True)


def _candidates(
    logits: Tensor,
    axis: int,
    known: Labels | None,
    hints: Labels | None,
    soft: Tensor | None,
) -> CandidateRows:
    total = logits.numel() // logits.shape[axis]
    wanted = _CANDIDATES * rows_read(logits.shape[axis])
    device = logits.device
    if total <= wanted:
        index = torch.arange(total, device=device)
        exists = torch.ones(total, dtype=torch.bool, device=device)
    elif known is None:
        index = torch.arange(wanted, device=device) * total // wanted
        exists = torch.ones(wanted, dtype=torch.bool, device=device)
    else:
        labelled = (known.here >= 0) | (known.ahead >= 0)
        if known.further is not None:
            labelled |= known.further >= 0
        found = evenly(labelled, wanted), evenly(~labelled, _UNLABELLED)
        index, exists = (torch.cat(parts) for parts in zip(*found, strict=True))
    return CandidateRows(
        axis=axis,
        index=index,
        exists=exists,
        logits=take_rows(logits, axis, index),
        labels=None if hints is None else hints.take(index),
        soft=None if soft is None else take_rows(soft.detach().to(device), axis, index),
        complete=total <= wanted,
    )


def take_rows(tensor: Tensor, axis: int, index: Tensor) -> Tensor:
    """Return rows [k, C] of a tensor whose classes are on ``axis``, without a copy of the rest."""
    moved = tensor.movedim(axis, -1)
    places = []
    for size in reversed(moved.shape[:-1]):
        places.append(index % size)
        index = index // size
    places.reverse()
    if not devices.on_accelerator(tensor.device) and len(index) <= _VIEWS:
        # Views of few rows: an index would walk through a tensor the size of the vocabulary.
        own = zip(*(place.tolist() for place in places), strict=True)
        return torch.stack([moved[place] for place in own])
    return moved[tuple(places)]
