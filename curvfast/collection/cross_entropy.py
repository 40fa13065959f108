"""Whether a gradient at logits is a cross-entropy's, and by which factor.

The gradient of s · Σ cross-entropies at logits z is s (p − e_y), p = softmax(z). So the entries of
a row off its label tell s, every row the same, and no other likelihood has that gradient. s holds
each factor between the summed loss and the backward: a mean's, accumulation's, AMP's scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from curvfast.collection.logits_reading import AGREEING
from curvfast.ops import devices

# Departures up to which a hard label explains a gradient, and no smoothing is looked for.
_PLAIN = 1e-4
NO_LABEL = -1
"""In a column of labels: this row has none."""

# Where one class off the label is more probable, its gradient is s whatever the rest of it is.
_CERTAIN = 0.99
# A gradient that should be so many times the smallest normal number is not rounded to nothing.
_NORMAL = 4


@dataclass(frozen=True)
class Labels:
    """Labels of candidate rows, each column int64 [k], :data:`NO_LABEL` where there is none."""

    here: Tensor
    """Of the row's own position."""
    ahead: Tensor
    """Of the next position."""
    further: Tensor | None = None
    """Of the one after, where it is unknown at which position the rows begin."""

    def take(self, rows: Tensor) -> Labels:
        """Return those of some rows, int64 [r]."""
        further = None if self.further is None else self.further[rows]
        return Labels(self.here[rows], self.ahead[rows], further)


def evenly(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the indices of ``count`` entries that are true, evenly spread, without a host wait.

    Args:
        mask: Bool [n].
        count: How many are wanted.

    Returns:
        int64 [count], indices into ``mask``; and bool [count], false for those that are in excess
        because fewer entries are true.
    """
    rank = mask.cumsum(0)  # [n]
    total = rank[-1]
    wanted = torch.arange(count, device=mask.device)
    wanted = torch.where(total > count, wanted * total // count, wanted) + 1
    return torch.searchsorted(rank, wanted).clamp_max(len(mask) - 1), wanted <= total


@torch.no_grad()
def measure(
    z: Tensor,
    g: Tensor,
    exists: Tensor,
    rows: int,
    labels: Labels | None = None,
    soft: Tensor | None = None,
) -> Tensor:
    """Return what ``Reading.of`` reads, float64 on the device, without a host wait.

    Args:
        z: Logits of candidate rows, [k, C].
        g: Gradient of the loss at them, [k, C].
        exists: Bool [k]; false for candidates that are in excess.
        rows: How many of those with a gradient are read.
        labels: Their labels, where known; else the smallest entry of a row's gradient is at it.
        soft: Probabilities of the classes, [k, C], where the labels are such.
    """
    tiny = max(torch.finfo(t.dtype).tiny for t in (z, g))
    alive = exists & (g != 0).any(1)
    chosen, used = evenly(alive, min(rows, len(z)))
    wide = torch.promote_types(torch.promote_types(z.dtype, g.dtype), torch.float32)
    z, g = z[chosen].to(wide), g[chosen].to(wide)  # [r, C]
    finite = [~(used & bad).any() for bad in (_improper(z), ~torch.isfinite(g).all(1))]
    p = z.softmax(1)
    # Of equal entries the most probable class: on a certain row even the label's rounds to zero.
    least = torch.where(g == g.amin(1, keepdim=True), z, -math.inf).argmax(1)
    k, votes = _vote(least, used, None if labels is None else labels.take(chosen), z.shape[1])
    off = torch.ones_like(p, dtype=torch.bool).scatter_(1, k[:, None], False)
    largest = p.where(off, 0.0).amax(1)  # [r]
    sums = g.sum(1).abs()
    s, residual = _off_label(p, g, off)
    # Below the smallest normal number a gradient tells nothing but its order.
    readable = used & (g.abs().where(off, 0.0).amax(1) >= tiny)
    expected = _mean(s, readable) * largest
    used = readable | (used & (expected >= _NORMAL * tiny))
    hard = _fit(s, residual, sums, used)
    smoothed, fitted, smoothing = torch.zeros_like(hard), torch.zeros_like(hard), hard[0] * 0
    if devices.on_accelerator(z.device) or not _settled(hard):
        slope, residual, epsilon = _line(p, g, off)
        smoothed, smoothing = _fit(slope, residual, sums, used), _mean(epsilon, used)
        # Taking turns hides nothing: an ε of its own in each row is no label smoothing.
        smoothed[1] = smoothed[1].maximum((epsilon - smoothing).abs().where(used, 0.0).amax())
    if soft is not None:
        fitted = _fit(*_projected(p - soft[chosen].to(wide), g), sums, used)
    telling = used & (largest <= _CERTAIN)
    facts = [smoothing, *votes, used.sum(), telling.sum(), alive.sum(), *finite]
    return torch.cat([hard, smoothed, fitted, torch.stack([fact.double() for fact in facts])])


def _settled(hard: Tensor) -> bool:
    """Return whether a hard label explains the gradients in float32: no other fit is needed."""
    scale, *departures, least = hard.tolist()
    return least > 0 and math.isfinite(scale) and max(departures) <= _PLAIN


def _improper(z: Tensor) -> Tensor:
    return (z.isnan() | (z == math.inf)).any(1)


def _vote(
    least: Tensor, used: Tensor, labels: Labels | None, classes: int
) -> tuple[Tensor, list[Tensor]]:
    """Return the label of each row, int64 [r], and the votes: here, ahead, compared."""
    none = torch.zeros((), dtype=torch.int64, device=least.device)
    if labels is None:
        return least, [none, none, none]
    compared = used & (labels.here != labels.ahead)
    here = (compared & (least == labels.here)).sum()
    ahead = (compared & (least == labels.ahead)).sum()
    known = least
    for column, count in ((labels.here, here), (labels.ahead, ahead)):
        # A certain row's gradient is rounded away at its label, which only the label itself tells.
        won = (count > 0) & (count >= AGREEING * compared.sum())
        known = torch.where(won & (column >= 0) & (column < classes), column, known)
    if labels.further is not None:
        ahead = ahead.maximum((compared & (least == labels.further)).sum())
    return known, [here, ahead, compared.sum()]


def _off_label(p: Tensor, g: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
    """Return s of each row and its residual, by the entries off the label."""
    p, g = p.where(off, 0.0), g.where(off, 0.0)
    s = g.sum(1) / p.sum(1)
    return s, _relative(g - s[:, None] * p, s, p)


def _line(p: Tensor, g: Tensor, off: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return slope, residual and label smoothing ε of each row: g = s p − s ε/C off the label."""
    classes = p.shape[1]
    centred, mean = [], []
    for x in (p, g):
        mean.append(x.where(off, 0.0).sum(1) / max(1, classes - 1))
        centred.append((x - mean[-1][:, None]).where(off, 0.0))
    slope = (centred[0] * centred[1]).sum(1) / centred[0].square().sum(1)
    residual = _relative(centred[1] - slope[:, None] * centred[0], slope, centred[0])
    return slope, residual, (slope * mean[0] - mean[1]) * classes / slope


def _projected(direction: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return s of each row and its residual, by least squares on p − q."""
    s = (direction * g).sum(1) / direction.square().sum(1)
    return s, _relative(g - s[:, None] * direction, s, direction)


def _mean(x: Tensor, used: Tensor) -> Tensor:
    return x.where(used, 0.0).sum() / used.sum().clamp_min(1)


def _relative(departure: Tensor, s: Tensor, direction: Tensor) -> Tensor:
    scale = s.abs() * direction.square().sum(1).sqrt()
    return departure.square().sum(1).sqrt() / scale


def _fit(s: Tensor, residual: Tensor, sums: Tensor, used: Tensor) -> Tensor:
    """Return the fields of :class:`Fit` over the rows used, float64 [5]."""
    mean = _mean(s, used)
    worst = [(s / mean - 1).abs(), residual, sums / s.abs()]
    return torch.stack([
        mean,
        *(departure.where(used, 0.0).amax() for departure in worst),
        s.where(used, math.inf).amin(),
    ])  # fmt: skip
