"""CallRows: the rows of one call of a layer, which of them count, and how that is known."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from curvfast.errors import ShapeError
from curvfast.model.gathers import (
    Hidden,
    checkpointed,
    from_parameters_only,
    gathered_positions,
)
from curvfast.model.layout import Layout, layouts
from curvfast.model.rows import AllRows, ChosenRows, FirstRows, Rows
from curvfast.model.stream import TokenStream
from curvfast.model.token_streams import Frame, recomputing
from curvfast.ops import devices

_TOLD, _CONVENTION = "told", "convention"
_BY_MASK = "mask()"


@dataclass(frozen=True)
class Said:
    """What counts, who says so, and how sure that is."""

    rule: str
    by: str
    how: str
    """``"told"`` by the caller, or ``"convention"``."""


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


_Way = tuple[TokenStream, Layout | None, Tensor | None]
"""A stream, how a layer's rows lie over its grid, and where in that they were gathered from."""


@dataclass(frozen=True, eq=False)
class Split:
    """The rows of one shape that count, and those that a mask or the last position leaves out."""

    counted: Everywhere
    left_out: Everywhere | None
    owners: Tensor | None
    """Sequence of every row, int64 [rows]; None: known from the leading dimension."""
    in_order: bool
    """Whether rows come sequence by sequence."""
    rule: str
    by: str
    how: str


@dataclass(eq=False)
class RowCache:
    """What was found in one batch, so that layers of one stream share one set of rows."""

    splits: dict[Any, Split] = field(default_factory=dict)
    frames: dict[str, list[Frame]] = field(default_factory=lambda: defaultdict(list))
    checkpointed: bool = False
    """Whether a layer ran in the first forward of a checkpointed region."""
    hidden: dict[str, list[CallRows]] = field(default_factory=lambda: defaultdict(list))
    told: dict[Any, TokenStream] = field(default_factory=dict)
    alive: list[Any] = field(default_factory=list)
    """What keys of this cache name by its memory."""

    def on_grid(self, stream: TokenStream, grid: torch.Size) -> TokenStream:
        """Return a stream whose grid nobody told on that of a layer; one object for all layers.

        Args:
            stream: The stream.
            grid: Leading shape of the layer's input.
        """
        key = (stream, grid)
        if key not in self.told:
            self.told[key] = replace(stream, grid=grid, _kept={})
        return self.told[key]

    def remember(self, layer: str, frame: Frame) -> None:
        """Note a call that a layer ran in.

        Args:
            layer: Its name.
            frame: The innermost running call.
        """
        known = self.frames[layer]
        if not any(each is frame for each in known):
            known.append(frame)


@dataclass(eq=False)
class CallRows:
    """The rows of one call of a layer; what counts is decided when it is first asked."""

    batch: Any
    layer: str
    streams: tuple[TokenStream, ...] = ()
    """What its rows may stand for, the likeliest first."""
    others: tuple[TokenStream, ...] = ()
    """Further streams that were told of in the calls around it."""
    sequence_first: bool | None = None
    exchanged: set[str] = field(default_factory=set)
    gathered: dict[int, Tensor] = field(default_factory=dict)
    """By number of the stream: flat position of each row, int64 [rows]."""
    of: torch.Size | None = None
    """Leading shape of what an expert's rows were routed from."""
    positions: Tensor | None = None
    """int64 [rows]: where each of an expert's rows stands in the flattened ``of``."""
    table: bool = False
    """Whether the input is made of parameters alone."""
    hidden: bool = False
    """Whether only a recomputation shows how its rows were gathered."""
    _splits: dict[torch.Size, Split] = field(default_factory=dict)

    @classmethod
    def of_call(cls, batch: Any, layer: str, x: Tensor, frame: Frame | None) -> CallRows:
        """Return the rows of a call; :meth:`curvfast.model.batch.Batch.call_rows` describes it."""
        rows = cls._begun(batch, layer, x, frame)
        if batch.rule is None and not all(s.whole(True) for s in rows.streams):
            rows._look(x)
        return rows

    @classmethod
    def of_expert(
        cls, batch: Any, layer: str, positions: Tensor, of: torch.Size, frame: Frame | None
    ) -> CallRows:
        """Return the rows of an expert; ``Batch.routed_rows`` describes it."""
        rows = cls._begun(batch, layer, None, frame)
        rows.positions, rows.of = positions, of
        return rows

    @classmethod
    def _begun(cls, batch: Any, layer: str, x: Tensor | None, frame: Frame | None) -> CallRows:
        known = batch.cache.frames.get(layer, ())
        frames = [frame] if frame is not None else list(known)
        streams: dict[TokenStream, None] = {}
        others: dict[TokenStream, None] = {}
        for each in frames:
            found = each.candidates(x) if x is not None else [each.stream]
            streams.update(dict.fromkeys(found))
            others.update(dict.fromkeys(each.others()))
        first = frames[0] if frames else None
        own = tuple(dict.fromkeys(_as_told(batch, s) for s in streams)) or (_unknown(batch),)
        rest = tuple(each for each in (_as_told(batch, s) for s in others) if each not in own)
        if batch.mask is not None and all(s.by != _BY_MASK for s in (*own, *rest)):
            own = tuple(_misfit(batch, s) for s in own)
        return cls(
            batch,
            layer,
            own,
            rest,
            first.sequence_first if first is not None else None,
            first.exchanged if first is not None else set(),
        )

    @property
    def half(self) -> int:
        """Index of the sum that the batch is added to."""
        return self.batch.half  # type: ignore[no-any-return]

    def rows(self, name: str, shape: torch.Size, device: torch.device) -> Rows:
        """Return the rows that count, the same ones for inputs and for gradients.

        Args:
            name: The layer.
            shape: Leading shape of its input.
            device: Where the index is needed.

        Raises:
            ShapeError: If what was told of positions does not explain ``shape``.
        """
        return self._split(name, shape, device).counted.on(device)

    def left_out(self, name: str, shape: torch.Size, device: torch.device) -> Rows | None:
        """Return the rows that a mask or the rule of the last position leaves out, None if none.

        Args:
            name: The layer.
            shape: Leading shape of its input.
            device: Where the index is needed.
        """
        left = self._split(name, shape, device).left_out
        return None if left is None else left.on(device)

    def known(self, name: str, shape: torch.Size) -> Said:
        """Return what counts, who says so, and how sure that is.

        Args:
            name: The layer.
            shape: Leading shape of its input.
        """
        split = self._split(name, shape, None)
        return Said(split.rule, split.by, split.how)

    def sequences(self, shape: torch.Size, rows: Rows, device: torch.device) -> Tensor:
        """Return the sequence of each counted row, int64 [count]; see :meth:`in_order`.

        Args:
            shape: Leading shape of the activation.
            rows: Those that count.
            device: Where it is needed.
        """
        index = rows.indices(device)
        owners = self._split(self.layer, shape, device).owners
        if owners is None:
            return index // max(1, shape[1:].numel())
        return owners.to(device)[index]

    def in_order(self, shape: torch.Size) -> bool:
        """Return whether :meth:`sequences` never goes back.

        Args:
            shape: Leading shape of the activation.
        """
        return self._split(self.layer, shape, None).in_order

    def stream(self, shape: torch.Size) -> TokenStream:
        """Return what the rows stand for.

        Args:
            shape: Leading shape of the activation.
        """
        return self._explained(self.layer, shape)[0]

    def padding(self, shape: torch.Size) -> Tensor | None:
        """Return which rows a mask says are pads, bool [rows]; None where no mask was given.

        Args:
            shape: Leading shape of the activation.
        """
        stream, layout, positions = self._explained(self.layer, shape)
        if stream.mask is None:
            return None
        pads = ~(stream.mask if layout is None else layout.spread(stream.mask)).reshape(-1)
        return pads if positions is None else pads[positions.to(pads.device)]

    def packed(self, shape: torch.Size) -> bool:
        """Return whether several documents stand in one sequence.

        Args:
            shape: Leading shape of the activation.
        """
        return self.stream(shape).packed

    def length(self, shape: torch.Size) -> int:
        """Return how many rows of a sequence follow each other.

        Args:
            shape: Leading shape of the activation.
        """
        grid = self.stream(shape).grid
        return (shape if grid is None else grid)[-1]

    # ---- how it is found

    def _look(self, x: Tensor) -> None:
        """Look at the graph of x where its shape does not tell what its rows are."""
        shape = x.shape[:-1]
        cache, again = self.batch.cache, recomputing()
        cache.checkpointed |= checkpointed()
        grids = [s.grid for s in self.streams if s.grid is not None]
        if not grids or shape in grids or x.dim() < 2 or shape in [g[::-1] for g in grids]:
            return
        if cache.checkpointed and not again and not checkpointed():
            return  # Its graph leads into regions that reading would recompute.
        try:
            for number, stream in enumerate(self.streams):
                if stream.grid is not None:
                    explain = _Explain(stream.grid, self.sequence_first)
                    found = gathered_positions(x, explain, inside=again)
                    if found is not None:
                        self.gathered[number] = found
        except Hidden:
            self.hidden = True
            self.batch.cache.hidden[self.layer].append(self)
            return
        if again:
            self._tell_hidden(shape.numel())
        if not self.gathered and (len(shape) == 1 or shape[0] == 1):
            self.table = from_parameters_only(x)

    def _tell_hidden(self, rows: int) -> None:
        """Tell the call whose recomputation this is what it shows, if that is one call."""
        waiting = [each for each in self.batch.cache.hidden.pop(self.layer, []) if each.hidden]
        if len(waiting) == 1:
            waiting[0].gathered, waiting[0].hidden = self.gathered, False
        elif waiting:
            self.batch.cache.hidden[self.layer] = waiting

    def _split(self, name: str, shape: torch.Size, device: torch.device | None) -> Split:
        if shape in self._splits and not self.batch.rule:
            return self._splits[shape]
        batch = self.batch
        if batch.rule:
            split = self._ruled(name, shape, device)
        else:
            split = self._found(name, shape, device or torch.device("cpu"))
        self._splits[shape] = split
        return split

    def _ruled(self, name: str, shape: torch.Size, device: torch.device | None) -> Split:
        """Return the rows that ``rows=`` chooses."""
        cache = self.batch.cache.splits
        key = ("rule", name, shape)
        routed = self.positions is not None
        if key in cache and not routed:
            return cache[key]  # type: ignore[no-any-return]
        if shape in self._splits:
            return self._splits[shape]
        of = self.of if self.of is not None else shape
        keep = checked(name, self.batch.rule(name, of), of).flatten()
        if self.positions is not None:
            keep = keep[self.positions.to(keep.device)]
        found = chosen(keep, device or keep.device)
        split = self._made(found, None, None, True, "rows=", "rows=", _TOLD, device or keep.device)
        split = replace(split, **self._owners(of, None))
        if not routed:
            cache[key] = split
        return split

    def _found(self, name: str, shape: torch.Size, device: torch.device) -> Split:
        stream, layout, positions = self._explained(name, shape)
        skip, batch = self.batch.skip_last, self.batch
        key = (stream, layout, shape, None if positions is None else _memory(positions), skip)
        if key in batch.cache.splits:
            return batch.cache.splits[key]  # type: ignore[no-any-return]
        how = _TOLD if stream.by == _BY_MASK else _CONVENTION
        owners = self._owners(shape, layout, stream, positions)
        if layout is None and positions is None:
            every = AllRows(shape.numel())
            rule = "every row"
            split = self._made(every, None, None, True, rule, stream.by, how, device)
        elif positions is None and layout is not None and layout.kind == "pooled":
            every, by = AllRows(shape.numel()), "one row a sequence, by its shape"
            split = self._made(every, None, None, True, "every row", by, how, device)
        else:
            split = self._of_stream(stream, shape, layout, positions, how, device)
        split = replace(split, **owners)
        batch.cache.splits[key] = split
        batch.cache.alive.append(positions)
        return split

    def _of_stream(
        self,
        stream: TokenStream,
        shape: torch.Size,
        layout: Layout | None,
        positions: Tensor | None,
        how: str,
        device: torch.device,
    ) -> Split:
        skip = self.batch.skip_last
        rule, by = stream.rule(skip), stream.by
        scored = self.batch.scored
        plain = layout is not None and positions is None and layout.in_order
        views = plain and devices.on_accelerator(device)
        length = stream.grid[-1] if stream.grid is not None else 1
        if views and scored is None and stream.all_but_last(skip):
            # Unpadded: a view suffices, and no index has to be computed on the device.
            first = FirstRows(shape.numel() // length, length, length - 1)
            return self._made(first, _lasts(first, device), None, True, rule, by, how, device)
        keep = stream.keep(skip, scored)
        if keep is None:
            return self._made(AllRows(shape.numel()), None, None, True, rule, by, how, device)
        if layout is not None:
            keep = layout.spread(keep)
        flat = keep.reshape(-1)
        if positions is not None:
            flat = flat[positions.to(flat.device)]
        order = (~flat).to(torch.uint8).argsort(stable=True)
        last = flat.view(-1, length)[:, -1].sum() if views else flat.sum()
        count, ends = torch.stack([flat.sum(), last]).tolist()  # the one wait for the device
        total = flat.numel()
        left = None if count == total else ChosenRows(order[count:].to(device))
        found: Rows = AllRows(total) if count == total else ChosenRows(order[:count].to(device))
        if views and not ends and total and count == total // length * (length - 1):
            found = FirstRows(total // length, length, length - 1)
        return self._made(found, left, None, True, rule, by, how, device)

    def _made(
        self,
        found: Rows,
        left: Rows | None,
        owners: Tensor | None,
        in_order: bool,
        rule: str,
        by: str,
        how: str,
        device: torch.device,
    ) -> Split:
        thin = self.batch.thin
        counted = Everywhere(thin(found, device) if thin else found)
        return Split(counted, Everywhere(left) if left else None, owners, in_order, rule, by, how)

    def _owners(
        self,
        shape: torch.Size,
        layout: Layout | None,
        stream: TokenStream | None = None,
        positions: Tensor | None = None,
    ) -> dict[str, Any]:
        """Return the sequence of every row, and whether rows come sequence by sequence."""
        if positions is None and self.positions is not None:
            positions = self.positions
            shape = self.of if self.of is not None else shape
        if stream is None or stream.grid is None:
            if positions is None:
                return {"owners": None, "in_order": True}
            return {"owners": positions // max(1, shape[1:].numel()), "in_order": False}
        length = stream.grid[-1]
        if layout is None and positions is None:
            fitting = layouts(shape, stream.grid, self.sequence_first)
            layout = fitting[0] if len(fitting) == 1 else None
        if layout is None:
            if positions is None:
                return {"owners": None, "in_order": True}
            return {"owners": positions // length, "in_order": False}
        owners = layout.positions().flatten() // length
        if positions is not None:
            return {"owners": owners[positions.to(owners.device)], "in_order": False}
        return {"owners": owners, "in_order": layout.in_order or layout.kind == "pooled"}

    def _explained(self, name: str, shape: torch.Size) -> _Way:
        """Return the stream of the rows, their layout, and positions of gathered rows.

        Raises:
            ShapeError: If nothing explains ``shape``, or two things do.
        """
        skip = self.batch.skip_last
        if all(s.whole(skip) for s in self.streams):
            return self.streams[0], None, self.positions
        own = self.of if self.of is not None else shape
        first = self.sequence_first
        if first is None and name in self.exchanged:
            first = True
        found: list[_Way] = []
        for number, stream in enumerate(self.streams):
            if stream.problem:
                raise ShapeError(f"{stream.problem}. {_way_out(name)}")
            if number in self.gathered and self.gathered[number].numel() == shape.numel():
                found.append((stream, None, self.gathered[number]))
                continue
            grid = stream.grid
            if stream.whole(skip):
                grid_fits = grid is not None and layouts(own, grid, first)
                if grid_fits or stream.grid is None:
                    found.append((stream, None, self.positions))
                continue
            if grid is None:
                if len(own) >= 2:
                    unsaid = self.batch.cache.on_grid(stream, own)
                    found.append((unsaid, layouts(own, own)[0], self.positions))
                continue
            found += [(stream, each, self.positions) for each in layouts(own, grid, first)]
        if not found:
            found = self._otherwise(own, shape, first)
        if len(found) != 1:
            raise ShapeError(self._unexplained(name, shape, len(found)))
        layout = found[0][1]
        if layout is not None and layout.transposed and layout.shape != layout.grid:
            self.exchanged.add(name)
        return found[0]

    def _otherwise(self, own: torch.Size, shape: torch.Size, first: bool | None) -> list[_Way]:
        """Return what else may explain rows: a table, another stream, the real positions."""
        if self.table:
            return [(TokenStream("parameters alone", role="image"), None, self.positions)]
        found: list[_Way] = []
        for stream in self.others:
            if stream.grid is not None and own in (stream.grid, stream.grid[::-1]):
                layout = layouts(own, stream.grid, first)[0]
                found.append((stream, layout, self.positions))
        if found or self.positions is not None or self.hidden:
            return found
        if len(_without_ones(shape)) != 1:
            return []
        for stream in self.streams:
            if stream.mask is not None:
                index = stream.mask.flatten().nonzero().squeeze(1)
                if index.numel() == shape.numel():
                    found.append((stream, None, index))
        return found

    def _unexplained(self, name: str, shape: torch.Size, ways: int) -> str:
        told = ", ".join(
            f"{list(s.grid or ())} ({s.by})" for s in dict.fromkeys((*self.streams, *self.others))
        )
        rows = f"{name!r} has {list(shape)} rows"
        what = "in more than one way" if ways else "by none of the positions known"
        hint = ""
        if self.hidden:
            hint = " A checkpointed forward does not show by which index rows were gathered."
        return f"{rows}, which is explained {what}: {told}.{hint} {_way_out(name)}"


class _Explain:
    """Flat positions of a grid, for rows of a leading shape."""

    def __init__(self, grid: torch.Size, sequence_first: bool | None) -> None:
        self._grid, self._first = grid, sequence_first

    def __call__(self, shape: torch.Size) -> Tensor | None:
        found = [each for each in layouts(shape, self._grid, self._first) if each.kind != "pooled"]
        return found[0].positions() if len(found) == 1 else None


def chosen(keep: Tensor, device: torch.device) -> Rows:
    """Return the rows for which ``keep``, bool of any shape, is true.

    Args:
        keep: One entry a row.
        device: Where the index is needed.
    """
    index = keep.reshape(-1).nonzero().squeeze(1)  # [count]
    return AllRows(keep.numel()) if len(index) == keep.numel() else ChosenRows(index.to(device))


def checked(name: str, keep: Tensor, shape: torch.Size) -> Tensor:
    """Return what ``rows=`` gave, if it is of use.

    Args:
        name: The layer.
        keep: What was returned for it.
        shape: Leading shape of its input.

    Raises:
        ShapeError: If it is not.
    """
    if keep.shape != shape or keep.dtype != torch.bool:
        raise ShapeError(
            f"rows= returned a {keep.dtype} tensor {list(keep.shape)} for layer {name!r}; it must "
            f"be a bool tensor of the leading shape of its input, {list(shape)}"
        )
    return keep


def _as_told(batch: Any, stream: TokenStream) -> TokenStream:
    """Return a stream with the mask that the caller told for positions of its shape."""
    if batch.mask is None or (stream.grid is not None and stream.grid != batch.mask.shape):
        return stream
    if stream.role == "image":
        return stream
    known = batch.cache.told
    if id(stream) not in known:
        batch.cache.alive.append(stream)
        known[id(stream)] = replace(
            stream, by=_BY_MASK, grid=batch.mask.shape, mask=batch.mask, raw_mask=batch.mask,
            documents=None, problem=None, _kept={},
        )  # fmt: skip
    return known[id(stream)]  # type: ignore[no-any-return]


def _misfit(batch: Any, stream: TokenStream) -> TokenStream:
    """Return a stream that cannot be used, since the mask that was told is of no known positions.

    What is no text is not described by a mask of tokens, and stays as it is.
    """
    if stream.role == "image" or stream.grid is None:
        return stream
    key = ("misfit", stream)
    if key not in batch.cache.told:
        problem = (
            f"the mask told by curvature.mask() is {list(batch.mask.shape)}, which does not "
            f"describe positions {list(stream.grid)} ({stream.by})"
        )
        batch.cache.told[key] = replace(stream, mask=batch.mask, problem=problem, _kept={})
    return batch.cache.told[key]  # type: ignore[no-any-return]


def _unknown(batch: Any) -> TokenStream:
    """Return the stream of a layer that no enclosing call tells anything of."""
    known = batch.cache.told
    if 0 not in known:
        by, grid = "no call around it tells", None
        if batch.mask is not None:
            by, grid = _BY_MASK, batch.mask.shape
        known[0] = TokenStream(by, grid, mask=batch.mask)
    return known[0]  # type: ignore[no-any-return]


def _lasts(first: FirstRows, device: torch.device) -> Rows | None:
    if not first.sequences:
        return None
    numbers = torch.arange(1, first.sequences + 1, device=device)
    return ChosenRows(numbers * first.length - 1)


def _way_out(name: str) -> str:
    return (
        "Say which of its rows count by rows=(name, shape) -> bool mask, give the mask of its "
        "positions to curvature.mask() before the call, or leave the layer out"
    )


def _memory(x: Tensor) -> tuple[Any, ...]:
    return (x.data_ptr(), x.shape, x.stride())


def _without_ones(shape: torch.Size) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)
