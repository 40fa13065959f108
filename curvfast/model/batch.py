"""Batch: mask, shape and labels of one call of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.errors import InputError, ShapeError
from curvfast.model.rows import IGNORED_LABEL, AllRows, ChosenRows, FirstRows, RowRule, Rows
from curvfast.ops import devices


class Everywhere:
    """Rows that count, found or drawn once, for activations on any of a model's devices."""

    def __init__(self, rows: Rows) -> None:
        """Take them as they were found."""
        self._first = rows
        self._rows: dict[torch.device, Rows] = {}

    def on(self, device: torch.device) -> Rows:
        """Return them for activations on a device; of one device always the same object."""
        if device not in self._rows:
            self._rows[device] = self._first.to(device)
        return self._rows[device]


@dataclass(eq=False)
class Batch:
    """Mask, shape, labels and loss of one call of the model."""

    skip_last: bool
    rule: RowRule | None = None
    mask: Tensor | None = None
    """Real positions, bool [sequences, length], or None where all are real."""
    positions: torch.Size | None = None
    """Leading shape [sequences, length] of the model's input, where it is known."""
    labels: int | None = None
    """Number of labels the loss was averaged over, if the call gives it."""
    targets: Tensor | None = None
    """The call's own labels, any shape; -100 where there is none."""
    predictions: torch.Size | None = None
    """Leading shape of the model's output, known after its forward."""
    thin: Callable[[Rows, torch.device], Rows] | None = None
    """Row subsampling; None counts all."""
    half: int = 0
    """Index of the sum it is added to, if there are two."""
    idle: bool = False
    """Whether none of its rows are counted."""
    _rows: dict[tuple[str | None, torch.Size], Everywhere] = field(default_factory=dict)
    _keep: dict[tuple[str | None, torch.Size], Tensor | None] = field(default_factory=dict)

    def rows(self, name: str, shape: torch.Size, device: torch.device) -> Rows:
        """Return the rows of layer ``name`` that count, its input being [*shape, features].

        Raises:
            ShapeError: If a mask is known and does not describe ``shape``.
        """
        key = (name if self.rule else None, shape)
        if key not in self._rows:
            found = self._find(name, shape, device)
            self._rows[key] = Everywhere(self.thin(found, device) if self.thin else found)
        return self._rows[key].on(device)

    def _find(self, name: str, shape: torch.Size, device: torch.device) -> Rows:
        if self.rule:
            return _as_rows(name, self.rule(name, shape), shape, device)
        grid = self._grid(name, shape)
        if grid is not None and self.mask is None and devices.on_accelerator(device):
            # Unpadded: a view suffices, and no index has to be computed on the device.
            sequences, length = grid[:-1].numel(), grid[-1]
            return FirstRows(sequences, length, length - 1)
        return _as_rows(name, self._real(name, shape), shape, device)

    def rows_among(
        self, name: str, shape: torch.Size, positions: Tensor, device: torch.device
    ) -> Rows:
        """Return which of the rows at ``positions`` count, of all that :meth:`rows` would count.

        Args:
            name: The layer.
            shape: Leading shape of all positions.
            positions: int64 on the CPU, [rows]: where each row stands in the flattened ``shape``.
            device: Where the index is needed.

        Raises:
            ShapeError: If a mask is known and does not describe ``shape``.
        """
        key = (name if self.rule else None, shape)
        if key not in self._keep:
            keep = self.rule(name, shape) if self.rule else self._real(name, shape)
            self._keep[key] = None if keep is None else _checked(name, keep, shape).cpu().flatten()
        keep = self._keep[key]
        own = None if keep is None else keep[positions]  # [rows of the expert]
        found = _as_rows(name, own, positions.shape, device)
        return self.thin(found, device) if self.thin else found

    def sequences(self, shape: torch.Size, rows: Rows, device: torch.device) -> Tensor:
        """Return the sequence of each counted row, int64 [count].

        Args:
            shape: Leading shape of the activation.
            rows: Those that count.
            device: Where it is needed.
        """
        return rows.indices(device) // self.sequence_length(shape)

    def sequence_length(self, shape: torch.Size) -> int:
        """Return the number of rows of one sequence in an activation [*shape, features].

        A sequence is a row of the model's input where the activation flattens that, else one entry
        of the leading dimension.
        """
        grid = self.positions if self.mask is None else self.mask.shape
        if grid is None or grid.numel() != shape.numel():
            grid = shape
        return max(1, grid[1:].numel())

    def label_count(self) -> int:
        """Return the number of labels over which a mean loss of this batch averages.

        Raises:
            InputError: If neither the call's labels nor its predictions give the number.
        """
        if self.labels is None:
            shape = self.predictions if self.predictions is not None else self.positions
            if shape is None:
                raise InputError(
                    "the gradient of a mean loss arrived, and over how many labels it was averaged "
                    "is unknown: the model was called without labels and returned no logits. Call "
                    "curvature.labels(n) before the model, or pass loss_reduction='sum'"
                )
            grid = self.positions if self.mask is None else self.mask.shape
            per_position = len(shape) > 1 and (grid is None or grid.numel() == shape.numel())
            keep = self._real("the model's output", shape) if per_position else None
            self.labels = shape.numel() if keep is None else int(keep.sum())
        return max(1, self.labels)

    def own_labels(self) -> int | None:
        """Return the number of labels passed to this call, or None if there were none."""
        return None if self.targets is None else int((self.targets != IGNORED_LABEL).sum())

    def _grid(self, name: str, shape: torch.Size) -> torch.Size | None:
        """Return the positions that ``shape`` flattens, or None where every row counts."""
        grid = self.positions if self.mask is None else self.mask.shape
        if self.mask is None and not self.skip_last:
            return None
        if grid is None and len(shape) >= 2:
            grid = shape
        if grid is None or grid.numel() != shape.numel():
            raise ShapeError(
                f"{name!r} has {list(shape)} rows, which the mask of {list(grid or ())} positions "
                "does not describe; say which of its rows count by rows=(name, shape) -> bool "
                "mask, or leave the layer out"
            )
        return grid

    def _real(self, name: str, shape: torch.Size) -> Tensor | None:
        grid = self._grid(name, shape)
        if grid is None:
            return None
        real = torch.ones(grid, dtype=torch.bool, device="cpu") if self.mask is None else self.mask
        return (drop_last(real) if self.skip_last else real).reshape(shape)


@dataclass(eq=False)
class Routed:
    """The rows of a batch that were routed to one expert, in one call of it."""

    batch: Batch
    positions: Tensor
    """int64 on the CPU: position of each row in the batch."""
    of: torch.Size
    """Leading shape of all positions."""
    _rows: Everywhere | None = None

    @property
    def half(self) -> int:
        """Index of the sum that the batch is added to."""
        return self.batch.half

    def rows(self, name: str, shape: torch.Size, device: torch.device) -> Rows:
        """Return the rows that count; the same ones for inputs and for gradients.

        Raises:
            ShapeError: If a mask is known and does not describe the positions.
        """
        if self._rows is None:
            self._rows = Everywhere(self.batch.rows_among(name, self.of, self.positions, device))
        return self._rows.on(device)

    def sequences(self, shape: torch.Size, rows: Rows, device: torch.device) -> Tensor:
        """Return the sequence of each counted row, int64 [count], by its unrouted position."""
        positions = self.positions.to(device)[rows.indices(device)]  # [count]
        return positions // self.batch.sequence_length(self.of)


def drop_last(real: Tensor) -> Tensor:
    """Return ``real`` [..., length] without the last real position of each sequence."""
    real_from_here = real.flip(-1).cumsum(-1).flip(-1)  # [..., length], counts
    return real & (real_from_here > 1)


def read_call(batch: Batch, arguments: Mapping[str, Any]) -> None:
    """Read mask, positions and label count from the arguments of a model's call.

    Raises:
        ShapeError: If ``attention_mask`` is not [sequences, length].
    """
    for key in ("input_ids", "inputs_embeds"):
        tokens = arguments.get(key)
        if isinstance(tokens, Tensor):
            batch.positions = tokens.shape[:2]
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and batch.mask is None:
        if mask.dim() != 2 and batch.rule is not None:
            mask = None
        elif mask.dim() != 2:
            raise ShapeError(
                f"attention_mask is {list(mask.shape)}; the real positions are read from a mask "
                "[sequences, length]. Call curvature.mask(mask_2d) before the model, or pass rows="
            )
        batch.mask = None if mask is None else mask.detach().bool()
    batch.targets = _targets(arguments, causal=batch.skip_last)
    # transformers' Trainer divides the summed loss by this number instead of the labels at hand.
    given = arguments.get("num_items_in_batch")
    if batch.labels is None:
        batch.labels = batch.own_labels() if given is None else int(given)


def _targets(arguments: Mapping[str, Any], *, causal: bool) -> Tensor | None:
    shifted, labels = arguments.get("shift_labels"), arguments.get("labels")
    if isinstance(shifted, Tensor):
        return shifted
    if isinstance(labels, Tensor) and causal:
        # Position t predicts label t + 1.
        return nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORED_LABEL)
    return labels if isinstance(labels, Tensor) else None


def _as_rows(name: str, keep: Tensor | None, shape: torch.Size, device: torch.device) -> Rows:
    if keep is None:
        return AllRows(shape.numel())
    index = _checked(name, keep, shape).reshape(-1).nonzero().squeeze(1)  # [count]
    if index.shape[0] == keep.numel():
        return AllRows(keep.numel())
    return ChosenRows(index.to(device))


def _checked(name: str, keep: Tensor, shape: torch.Size) -> Tensor:
    if keep.shape != shape or keep.dtype != torch.bool:
        raise ShapeError(
            f"rows= returned a {keep.dtype} tensor {list(keep.shape)} for layer {name!r}; it must "
            f"be a bool tensor of the leading shape of its input, {list(shape)}"
        )
    return keep
