"""Targets: which predictions of a batch get a label, and which label that is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.errors import InputError, ShapeError
from curvfast.model.rows import IGNORED_LABEL, AllRows, ChosenRows, FirstRows, Rows
from curvfast.model.stream import drop_last
from curvfast.ops import devices

LabelMask = str | Callable[[Any], Tensor]
"""The name of a batch's label mask, or a function that returns it: bool, of the labels' shape."""

_DOCUMENTS = ("cu_seq_lens_q", "cu_seqlens", "cu_seqlens_q", "cu_seq_lens")


@dataclass(frozen=True, eq=False)
class Targets:
    """Labels of a batch, each beside the prediction that it scores."""

    labels: Tensor | None
    """The batch's own labels, -100 where there is none."""
    scored: Tensor | None
    """bool, of the shape of the labels: where a label is wanted; None: everywhere."""
    ignored: int | None = None
    """A further value that is no label."""

    def known(self, *, classes: bool) -> Tensor | None:
        """Return int64, -100 where no label is wanted, or None where nothing says.

        Args:
            classes: Whether labels are classes, among which -100 is none.
        """
        if classes and self.labels is not None and not self.labels.is_floating_point():
            known = self.labels.long()
            if self.ignored is not None:
                known = known.masked_fill(known == self.ignored, IGNORED_LABEL)
        elif self.scored is not None:
            known = torch.zeros_like(self.scored, dtype=torch.long)
        else:
            return None
        return known if self.scored is None else known.masked_fill(~self.scored, IGNORED_LABEL)


def read_targets(
    batch: Any,
    arguments: dict[str, Any],
    label_mask: LabelMask | None,
    *,
    causal: bool,
    ignored: int | None = None,
) -> Targets:
    """Take labels and their mask out of a model's arguments.

    Args:
        batch: As the caller gave it.
        arguments: What the model will be called with; labels and their mask are removed.
        label_mask: Where labels are wanted.
        causal: Whether position t predicts the label at t + 1.
        ignored: A value of labels that is none, besides -100.

    Raises:
        InputError: If the batch has no such mask, or it is no bool tensor.
        ShapeError: If mask and labels differ in shape.
    """
    labels, shifted = (arguments.pop(name, None) for name in ("labels", "shift_labels"))
    if isinstance(batch, Mapping):
        # As they were given: where they are is then found on the host, without a wait.
        labels, shifted = batch.get("labels"), batch.get("shift_labels")
    scored = _label_mask(batch, arguments, label_mask)
    if isinstance(shifted, Tensor):
        labels = shifted
    elif isinstance(labels, Tensor) and causal and labels.dim() > 1:
        labels = _shifted(labels, IGNORED_LABEL)
    if scored is not None and causal and scored.dim() > 1:
        scored = _shifted(scored, False)
    labels = labels if isinstance(labels, Tensor) else None
    if labels is not None and scored is not None and scored.shape not in (
        labels.shape, labels.shape[:-1],
    ):  # fmt: skip
        raise ShapeError(
            f"label_mask= is {list(scored.shape)}, and the labels are {list(labels.shape)}: it "
            "must be bool, an entry for each prediction"
        )
    return Targets(labels, scored, ignored)


def _label_mask(batch: Any, arguments: dict[str, Any], mask: LabelMask | None) -> Tensor | None:
    if mask is None:
        return None
    if isinstance(mask, str):
        arguments.pop(mask, None)
        found = batch.get(mask) if isinstance(batch, Mapping) else None
    else:
        found = mask(batch)
    if not isinstance(found, Tensor) or found.is_floating_point():
        has = type(found).__name__ if not isinstance(found, Tensor) else str(found.dtype)
        raise InputError(
            f"label_mask={mask!r} gave {has} for a batch; pass the name of a bool tensor in every "
            "batch, or a function from a batch to one, of the shape of its labels"
        )
    return found.bool()


def _shifted(values: Tensor, end: float) -> Tensor:
    """Return values [..., length], that of t + 1 at t, and ``end`` last."""
    return nn.functional.pad(values[..., 1:], (0, 1), value=end)


def scored_rows(
    arguments: Mapping[str, Any], targets: Targets, predictions: torch.Size, device: torch.device,
    *, causal: bool, decoder: bool, classes: bool,
) -> Rows:  # fmt: skip
    """Return which of the flattened predictions get a label.

    Those of real positions, in a causal model but the last of each sequence or document, where the
    batch's labels are not -100 and ``label_mask=`` says so.

    Args:
        arguments: What the model was called with.
        targets: The batch's own labels, and where they are wanted.
        predictions: Shape of the predictions.
        device: Where the rows are needed.
        causal: Whether position t predicts the label at t + 1.
        decoder: Whether predictions are those of a decoder with a mask of its own.
        classes: Whether labels are classes.

    Raises:
        ShapeError: If a mask or the labels do not describe the predictions.
    """
    own = targets.known(classes=classes)
    if own is not None and own.shape != predictions:
        raise ShapeError(
            f"labels or their mask are {list(own.shape)}, and the model predicts "
            f"{list(predictions)}: which predictions have a label cannot be told. Make them of one "
            "shape, or where labels are drawn leave them out of the batch"
        )
    given = None if own is None else own != IGNORED_LABEL
    if len(predictions) < 2:
        # One prediction a sequence or image: which of its positions are real does not matter.
        return _rows(given, predictions, device)
    mask = arguments.get("decoder_attention_mask" if decoder else "attention_mask")
    real = mask if isinstance(mask, Tensor) else None
    if real is not None and real.shape != predictions:
        if given is None:
            raise ShapeError(
                f"the attention mask is {list(real.shape)}, and the model's logits are of "
                f"{list(predictions)} predictions, which it does not describe: say which of them "
                "get a label by label_mask=, of that shape"
            )
        real = None
    if not causal:
        found = None if real is None else real.bool()
        return _rows(_both(found, given), predictions, device)
    ends = _document_ends(arguments, real, predictions)
    if real is None and ends is None and given is None:
        length = predictions[-1]
        if devices.on_accelerator(device):
            return FirstRows(predictions[:-1].numel(), length, length - 1)
    whole = torch.ones(predictions, dtype=torch.bool, device="cpu") if real is None else real.bool()
    found = drop_last(whole)
    return _rows(_both(_both(found, None if ends is None else ~ends), given), predictions, device)


def _document_ends(
    arguments: Mapping[str, Any], mask: Tensor | None, predictions: torch.Size
) -> Tensor | None:
    """Return which positions are the last of a document packed into a row, bool, or None."""
    places = arguments.get("position_ids")
    ends = None
    if isinstance(places, Tensor) and places.dim() == 2 and places.shape[-1] == predictions[-1]:
        following = places[:, 1:] <= places[:, :-1]
        ends = nn.functional.pad(following, (0, 1), value=True).expand(predictions)
        if mask is not None:
            # Positions of padding mean nothing.
            ends = ends & nn.functional.pad(mask[:, 1:].bool(), (0, 1), value=False)
    for name in _DOCUMENTS:
        sums = arguments.get(name)
        if isinstance(sums, Tensor) and sums.dim() == 1 and predictions.numel() == predictions[-1]:
            own = torch.zeros(predictions, dtype=torch.bool, device=sums.device)
            own.view(-1)[(sums[1:].long() - 1).clamp(0, predictions[-1] - 1)] = True
            ends = _both(ends, own, either=True)
    if mask is not None and not mask.is_floating_point() and mask.dtype != torch.bool:
        # A mask that numbers the documents: 1 1 1 2 2 0.
        following = (mask[:, 1:] != mask[:, :-1]) & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
        ends = _both(ends, nn.functional.pad(following, (0, 1), value=False), either=True)
    return ends


def _both(one: Tensor | None, other: Tensor | None, *, either: bool = False) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    other = other.to(one.device)
    return one | other if either else one & other


def _rows(keep: Tensor | None, shape: torch.Size, device: torch.device) -> Rows:
    if keep is None:
        return AllRows(shape.numel())
    index = keep.reshape(-1).nonzero().squeeze(1)  # [count]
    return AllRows(shape.numel()) if len(index) == keep.numel() else ChosenRows(index.to(device))
