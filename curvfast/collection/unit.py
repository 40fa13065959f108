"""Unit: the factor from the gradients of a caller's loss to those of the summed loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from curvfast.collection.logits_reading import Reading
from curvfast.kfac.known import PROVEN, TOLD, Known

_WAYS_OUT = (
    "Pass loss_reduction='sum' if the loss is summed over its labels (with loss_scale=c if the "
    "loop multiplies it by c besides); or call curvature.labels(n) before each call of it, n "
    "being the number that the loss of that call is divided by (labels, or all elements of a "
    "squared error's mean); or pass loss_scale=c alone, if the loss is always c times the sum over "
    "labels, such as 1/n of a fixed n"
)


_SUMMED = "gradients of the summed cross-entropy"


@dataclass(frozen=True)
class Told:
    """What the caller said of a loss."""

    reduction: str | None = None
    """"mean", "sum", or None where it was not said."""
    scale: float | None = None
    """Factor of that loss; None where it was not said."""
    amp: float | None = None
    """Scale of AMP's gradient scaler, where there is one."""
    labels: int | None = None
    """``labels(n)`` of this call."""

    @property
    def factor(self) -> float:
        """The factor of the loss, 1 where none was told."""
        return (1.0 if self.scale is None else self.scale) * (self.amp or 1.0)


@dataclass(frozen=True)
class Counts:
    """What a mean of a batch may be over; None where it is unknown."""

    items: int | None = None
    """``num_items_in_batch`` of the call."""
    labels: int | None = None
    """Labels of the call that are not ignored and that a prediction can be scored by."""
    rows: int | None = None
    """Rows of the logits."""
    sequences: int | None = None
    """Sequences of the batch."""


@dataclass(frozen=True)
class Unit:
    """The factor from a gradient of the batch to that of the summed loss."""

    value: float
    known: Known
    contradicted: float | None = None
    """The unit that the gradient at the logits proves, where the caller told another one."""


@dataclass(frozen=True)
class Unknown:
    """Why the unit of a batch cannot be known."""

    reason: str
    ways_out: str = field(default=_WAYS_OUT, repr=False)

    @property
    def message(self) -> str:
        """The reason, and what to pass."""
        return (
            f"what the caller's loss is a mean over cannot be known: {self.reason}. {self.ways_out}"
        )


def unit_of(
    reading: Reading | None,
    told: Told,
    counts: Counts = Counts(),
    factor: float | None = None,
) -> Unit | Unknown:
    """Return the unit of a batch's gradients.

    In this order: a told sum; a cross-entropy proven by the gradient at the logits; a told number
    of labels; a told mean over the call's labels; a told factor of the summed loss.

    Args:
        reading: What the gradient at the logits shows, if it could be watched.
        told: What the caller said.
        counts: What a mean may be over.
        factor: The gradient that arrived at the loss the model returned, if one did.
    """
    proven = _proven(reading, told, counts, factor)
    if told.reduction == "sum":
        by = "loss_reduction='sum'" + ("" if told.scale is None else f", loss_scale={told.scale:g}")
        known = Known("gradients of the summed loss", by, TOLD)
        return Unit(1 / told.factor, known, _contradicts(1 / told.factor, reading, proven))
    if isinstance(proven, Unit):
        return proven
    numbers = _told_numbers(reading, told, counts)
    if len(set(numbers)) > 1:
        return Unknown(
            f"a mean over the labels of the call was told, and whether it is over {numbers[0]} or "
            f"{numbers[1]} does not show: {proven}"
        )
    if numbers:
        by = "loss_reduction='mean', labels of the call"
        by = by if told.labels is None else "labels(n)"
        value = numbers[0] / _told_factor(told, factor)
        known = Known("gradients of a mean over labels, times their number", by, TOLD)
        return _finite(Unit(value, known, _contradicts(value, reading, None)))
    if told.scale is not None and told.reduction is None:
        known = Known("gradients of the summed loss", f"loss_scale={told.scale:g}", TOLD)
        return Unit(1 / told.factor, known, _contradicts(1 / told.factor, reading, None))
    return Unknown(proven)


def one_of(readings: Mapping[str, Reading]) -> Reading | Unknown | None:
    """Return the reading that decides, of those of all watched outputs by name.

    Returns:
        That of a cross-entropy where there is one, with the rows of all that are scored by it,
        such as starts and ends of answers; else the first with a gradient; None without
        readings; Unknown where two outputs are scored by cross-entropies of two scales.
    """
    scored = {name: r for name, r in readings.items() if r.is_cross_entropy}
    if not scored:
        moved = [reading for reading in readings.values() if not reading.silent]
        return next(iter(moved or readings.values()), None)
    (first, chosen), *others = scored.items()
    for name, reading in others:
        rounding = max(chosen.tolerance.farthest, reading.tolerance.farthest)
        if abs(_scale(reading) / _scale(chosen) - 1) > rounding:
            return Unknown(
                f"two outputs are scored by cross-entropies, {first} by {_scale(chosen):.6g} of "
                f"their sum and {name} by {_scale(reading):.6g}, so there is no one summed loss"
            )
    return replace(
        chosen,
        moved=sum(reading.moved for reading in scored.values()),
        complete=all(reading.complete for reading in scored.values()),
    )


def _proven(
    reading: Reading | None, told: Told, counts: Counts, factor: float | None
) -> Unit | str:
    """Return the unit the gradient at the logits proves, or why it proves none."""
    if reading is None:
        return (
            "no output of the model could be watched for the gradient of its logits (a loss made "
            "inside without logits, outputs of one dimension, or a backward that passed them by)"
        )
    if not reading.finite:
        return "the logits or their gradient are not finite"
    if reading.silent:
        return "the gradient at the logits is zero in every row that was looked at"
    fit = reading.fit
    # Rows all certain of another class have a hinge's gradient too: then a number must agree.
    certain = fit is None and not reading.telling and reading.rows > 1
    if certain and reading.hard.holds(reading.tolerance):
        fit = reading.hard
    else:
        certain = False
    if fit is None and reading.weights_differ:
        return (
            "the gradient at the logits is a cross-entropy's in each row, with weights that differ "
            "by row (class weights, means of sequence means, a focal loss, advantages)"
        )
    if fit is None:
        return (
            "the gradient at the logits is that of no cross-entropy of these logits (another loss, "
            "or a term beside it)"
        )
    value, tolerance = 1 / fit.scale, reading.tolerance
    by = "the gradient at the logits"
    candidates = _candidates(reading, told, counts, factor)
    distances = [abs(exact / value - 1) for _, exact in candidates]
    if min(distances, default=math.inf) <= fit.error(tolerance):
        # Of those that rounding does not tell apart the likelier.
        near = min(distances) + tolerance.slack
        over, value = next(c for c, d in zip(candidates, distances, strict=True) if d <= near)
        known = Known(f"{_SUMMED} (the loop's is {over})", by, PROVEN)
    elif not reading.coarse and reading.rows > 1 and not certain:
        known = Known(_SUMMED, by, PROVEN)
    else:
        known = None
    if known is not None:
        return Unit(value, known, _told_otherwise(value, reading, told, counts, factor))
    why = (
        "in 16 bits" if reading.coarse else "in rows all certain" if certain else "in a single row"
    )
    return (
        f"the gradient at the logits is a cross-entropy's over about {value:.4g} labels, which "
        f"{why} can be said no more exactly, and no number of labels or rows fits: a factor of the "
        "loop such as 1/accumulation steps may be missing, which loss_scale= tells"
    )


def _candidates(
    reading: Reading, told: Told, counts: Counts, factor: float | None
) -> list[tuple[str, float]]:
    """Return units that are exact if they are the one, the likelier first."""
    own = told.factor if factor is None else factor
    if not (math.isfinite(own) and own > 0):
        return []
    numbers = [
        ("the mean over labels(n)", told.labels),
        ("the mean over num_items_in_batch", counts.items),
        *(("the mean over labels", n) for n in (counts.labels, *reading.counted_labels)),
        ("the mean over rows with a gradient", reading.nonzero),
        ("the mean over rows", counts.rows),
        ("the mean over sequences", counts.sequences),
        ("the sum", 1),
    ]
    return [(over, n / own) for over, n in numbers if n]


def _told_factor(told: Told, factor: float | None) -> float:
    # A loop that goes up the loss negates it; G does not depend on the sign.
    return told.factor if told.scale is not None or factor is None else abs(factor)


def _told_numbers(reading: Reading | None, told: Told, counts: Counts) -> list[int]:
    """Return over how many labels the loss is a mean, as it was told; none where it was not."""
    if told.labels is not None:
        return [told.labels]
    if told.reduction != "mean":
        return []
    own = [counts.labels] if counts.labels or reading is None else reading.counted_labels[:1]
    return [n for n in (counts.items, *own) if n]


def _told_otherwise(
    proven: float, reading: Reading, told: Told, counts: Counts, factor: float | None
) -> float | None:
    """Return the proven unit if another one was told."""
    # "mean" alone leaves the loop's own factor to be read.
    if told.labels is None and told.scale is None:
        return None
    numbers = _told_numbers(reading, told, counts)
    scale = _told_factor(told, factor)
    contradicted = [n for n in numbers if abs(n / scale / proven - 1) > _allowed(reading)]
    return proven if numbers and len(contradicted) == len(numbers) else None


def _contradicts(value: float, reading: Reading | None, proven: Unit | str | None) -> float | None:
    """Return the unit of a cross-entropy that is not the one that was told."""
    if reading is None or (fit := reading.fit) is None:
        return None
    shown = proven.value if isinstance(proven, Unit) else 1 / fit.scale
    return shown if abs(value / shown - 1) > _allowed(reading) else None


def _allowed(reading: Reading) -> float:
    """Return by how much a unit that was told may differ from the one that is proven."""
    return reading.tolerance.spread if reading.coarse else reading.tolerance.farthest


def _finite(unit: Unit) -> Unit | Unknown:
    if math.isfinite(unit.value) and unit.value > 0:
        return unit
    return Unknown("the loop multiplied the loss the model returned by zero or by no finite number")


def _scale(reading: Reading) -> float:
    fit = reading.fit
    assert fit is not None
    return fit.scale
