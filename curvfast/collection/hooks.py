"""Capture: hooks that observe inputs and output gradients of linear layers, and change nothing.

The input a of a layer is saved by autograd, and read back when the gradient g of
that very call arrives. So a and g always belong together: under activation checkpointing,
re-entrant or not, a is recomputed rather than held, and a forward that is recomputed, or never
followed by a backward, counts nothing. Only where we drive the passes ourselves, and each forward
is known to run once and to be followed by its backward, is a counted at once and released.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from curvfast.collection.refusal import Refusals
from curvfast.errors import CoverageError
from curvfast.model.batch import Batch
from curvfast.model.counted import CallRows
from curvfast.model.families import LinearLayer, Part, Product, Removable, watch
from curvfast.model.token_streams import Frame

_NO_START = (
    "it returns several tensors, and nothing before it needs a gradient, so the backward of a "
    "driven pass would end inside it; choose a layer before it too, or use collect() around a loop"
)


@dataclass(eq=False)
class SharedInput:
    """One tensor that one or more layers read: gate and up, or q, k and v."""

    readers: set[str] = field(default_factory=set)
    added: bool = False
    """True once its rows are in the second moments of its readers."""


@dataclass(frozen=True)
class Arrival:
    """One call of one layer, complete: its input and the gradient of its output."""

    layer: str
    batch: CallRows
    shared: SharedInput
    x: Tensor | None
    """[..., d_in]; None if it was counted in the forward"""
    g: Tensor
    """[..., d_out], in the units of the caller's loss"""
    again: bool = False
    """Whether an earlier backward counted its rows."""


@dataclass
class Calls:
    """Call counts of a layer, for errors that explain a missing gradient."""

    forward: int = 0
    without_grad: int = 0
    gradients: int = 0
    resting: int = 0
    """Forwards that had no row for it, as of an expert without tokens."""
    transformed: int = 0
    """Forwards inside ``vmap``, ``grad`` and other transforms, which were left alone."""
    unread: dict[str, int] = field(default_factory=dict)
    """Forwards that were no product of rows that could be read: reason -> how many."""

    def why_unseen(self) -> str | None:
        """Return why calls that were made are not in the sums, or None.

        Calls inside a transform explain only a layer that had no other.
        """
        if self.unread:
            return "; ".join(self.unread)
        if self.transformed and not self.forward:
            return (
                f"all of its {self.transformed} calls ran inside torch.func (vmap, grad, jvp) or "
                "forward-mode AD, which are left alone: collect around a plain forward and backward"
            )
        return None


class _Keep(torch.autograd.Function):
    """Saves a tensor the way autograd saves its own, so checkpointing and offloading treat it so.

    The same device as ``torch.utils.checkpoint`` uses for the inputs of a checkpointed region.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise AssertionError("the kept tensor is read, never differentiated")


class _Start(torch.autograd.Function):
    """The node where the backward of a driven pass ends: a copy, which may be modified in place."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


@dataclass(frozen=True, eq=False)
class _Piece:
    """One layer's part of a product."""

    layer: LinearLayer
    rows: slice | Tensor | None
    batch: CallRows
    shared: SharedInput

    def inputs(self, x: Tensor) -> Tensor:
        if self.rows is not None:
            return _take(x, self.layer.d_in, self.rows)
        return x if self.layer.patch is None and x.dim() > 1 else self.layer.inputs(x)

    def gradients(self, g: Tensor) -> Tensor:
        if self.rows is not None:
            return _take(g, self.layer.d_out, self.rows)
        return g if self.layer.patch is None and g.dim() > 1 else self.layer.gradients(g)


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context without autocast; a device that has none, such as meta, needs nothing."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@dataclass
class _Call:
    """The state kept from the forward of one product for its gradient."""

    pieces: list[_Piece]
    kept: Tensor | None
    """Whose node keeps the input; a node alone may lose it. None once read, or counted before."""
    shape: torch.Size
    """Of the output, of which the gradient may be that of a flat tensor."""
    done: bool = False


class Capture:
    """Hooks on the chosen layers of a model."""

    def __init__(
        self,
        layers: dict[str, LinearLayer],
        current_batch: Callable[[], Batch],
        current_frame: Callable[[], Frame | None],
        on_arrival: Callable[[Arrival], None],
        on_input: Callable[[str, CallRows, SharedInput, Tensor], None] | None,
        *,
        share_inputs: bool,
        driven: bool,
        refusals: Refusals | None = None,
    ) -> None:
        """Store the arguments; :meth:`attach` registers the hooks.

        Args:
            layers: Layers by name.
            current_batch: Returns the batch of the running forward.
            current_frame: Returns the innermost running call that told of positions.
            on_arrival: Called with every complete call, in its backward.
            on_input: Called with (layer, batch, shared, x) in the forward of a driven pass; None
                keeps the input there too, until its gradient arrives.
            share_inputs: Whether layers that read one tensor share a record of it.
            driven: Whether each forward runs once and its backward follows. Inputs may then be
                counted in the forward, and an output without gradient becomes the place where the
                backward ends: nothing below the first layer of a frozen model needs one.
            refusals: Takes the errors found inside hooks; None raises them there.
        """
        self.calls = {name: Calls() for name in layers}
        self._layers = layers
        self._current_batch = current_batch
        self._current_frame = current_frame
        self._on_arrival = on_arrival
        self._on_input = on_input
        self._share_inputs = share_inputs
        self._driven = driven
        self._refusals = refusals or Refusals()
        self.deaf = False
        """True while neither a forward nor a gradient counts."""
        self._seen: list[tuple[weakref.ref[Tensor], tuple[Any, ...], SharedInput]] = []
        self._pending: tuple[_Piece, Tensor, int] | None = None
        self._handles: list[Removable] = []

    def attach(self) -> None:
        """Register the hooks."""
        self._handles = watch(self._layers.values(), self)

    def remove(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()
        self._pending = None

    def forget(self) -> None:
        """Release the callbacks: later gradients count nothing, and keep nothing alive."""
        self._current_batch = self._current_frame = _nothing_more  # type: ignore[assignment]
        self._on_arrival = self._on_input = _nothing_more

    def flush(self) -> None:
        """Count the last input of a driven pass, whose readers are known now."""
        if self._pending is None:
            return
        (piece, x, version), self._pending = self._pending, None
        if x._version != version:
            raise CoverageError(
                f"the input of {piece.layer.name!r} was modified in place before it was counted; "
                "leave the layer out, or make the operation after it out of place"
            )
        self._count(piece, x)

    def paused(self) -> bool:
        """Return whether the batch of the running forward is not counted."""
        return self.deaf or self._refusals.error is not None or self._current_batch().idle

    def on_no_tokens(self, layer: str) -> None:
        """Record that a forward had no row for a layer."""
        self.calls[layer].resting += 1

    def on_transformed(self, layer: str) -> None:
        """Record a call inside a transform, which has no gradient of the caller's loss."""
        self.calls[layer].transformed += 1

    def on_unread(self, layer: str, reason: str) -> None:
        """Record a call whose rows cannot be read; where we drive the passes, say so at once.

        Raises:
            CoverageError: In a driven pass.
        """
        if self._driven:
            raise CoverageError(f"{layer!r} cannot be measured: {reason}")
        unread = self.calls[layer].unread
        unread[reason] = unread.get(reason, 0) + 1

    def on_product(self, product: Product) -> Tensor:
        """Record one product; return its output, which starts the graph if nothing did before."""
        return self._refusals.run(self._on_product, product, aside=product.y)

    def _on_product(self, product: Product) -> Tensor:
        x, y = product.x, product.y
        if self.deaf:
            return y
        batch = self._current_batch()
        if batch.idle:
            return y
        frame = self._current_frame()
        for part in product.parts:
            batch.remember(part.layer, frame)
        blind = not torch.is_grad_enabled() or not (y.requires_grad or self._driven)
        for part in product.parts:
            calls = self.calls[part.layer]
            calls.forward += 1
            calls.without_grad += blind
        if blind:
            return y
        if not y.requires_grad:
            if not product.alone:
                self.on_unread(product.parts[0].layer, _NO_START)
                return y
            anchor = torch.empty(0, device=y.device, requires_grad=True)
            y = _Start.apply(anchor, y)  # type: ignore[no-untyped-call]
        pieces = [self._piece(part, x, batch) for part in product.parts]
        kept = None
        if self._driven and self._on_input is not None:
            self._read(pieces, x)
        else:
            anchor = torch.empty(0, device=x.device, requires_grad=True)
            kept = _Keep.apply(anchor, x.detach())  # type: ignore[no-untyped-call]
        made = _made(y, x)
        made.register_hook(
            partial(self._refusals.run, self._on_gradient, _Call(pieces, kept, y.shape), aside=None)
        )
        return y

    def _piece(self, part: Part, x: Tensor, batch: Batch) -> _Piece:
        layer, frame = self._layers[part.layer], self._current_frame()
        if part.positions is None or part.of is None:
            rows = batch.call_rows(part.layer, x, frame)
            return _Piece(layer, part.rows, rows, self._shared(layer, x, batch))
        routed = batch.routed_rows(part.layer, part.positions, part.of, frame)
        return _Piece(layer, part.rows, routed, SharedInput({part.layer}))

    def _read(self, pieces: list[_Piece], x: Tensor) -> None:
        """Count the input of a driven pass: at once, or when it is known who else reads it."""
        first = pieces[0]
        if self._pending is not None and self._pending[0].shared is first.shared:
            return
        self.flush()
        if first.batch.positions is None:
            self._pending = (first, x.detach(), x._version)
            return
        for piece in pieces:
            self._count(piece, x.detach())

    def _count(self, piece: _Piece, x: Tensor) -> None:
        assert self._on_input is not None
        piece.shared.added = True
        with torch.no_grad(), no_autocast(x.device):
            self._on_input(piece.layer.name, piece.batch, piece.shared, piece.inputs(x))

    def _on_gradient(self, call: _Call, g: Tensor) -> None:
        if self.deaf:
            return
        name = call.pieces[0].layer.name
        again, several = call.done, call.pieces[0].batch.batch.several
        if again and not several:
            raise CoverageError(
                f"a second backward ran through one forward of {name!r} (retain_graph=True, or "
                "create_graph=True as for a gradient penalty or a Hessian-vector product), which "
                "would count its rows twice. Run a forward that is differentiated twice inside "
                "`with curvature.paused():`, where nothing counts, and let another be counted; or "
                "sum the losses and run one backward"
            )
        x = None
        if call.kept is not None:
            try:
                (x,) = call.kept.grad_fn.saved_tensors  # type: ignore[union-attr]
            except RuntimeError as error:
                raise CoverageError(
                    f"the input of {name!r} is gone when its gradient arrives: {error}. The "
                    "likely cause is an in-place operation on the tensor the layer read; leave the "
                    "layer out"
                ) from error
        # The graph may outlive the backward in the caller's loss: hold nothing through it.
        call.kept, call.done = call.kept if several else None, True
        with torch.no_grad(), no_autocast(g.device):
            g = g if g.shape == call.shape else g.reshape(call.shape)
            for piece in call.pieces:
                self.calls[piece.layer.name].gradients += 1
                inputs = None if x is None else piece.inputs(x)
                own = piece.gradients(g)
                self._on_arrival(
                    Arrival(piece.layer.name, piece.batch, piece.shared, inputs, own, again)
                )

    def _shared(self, layer: LinearLayer, x: Tensor, batch: Batch) -> SharedInput:
        """Return the record of the tensor this call reads: one for all layers that read it."""
        name = layer.name
        if not self._share_inputs:
            return SharedInput({name})
        # The storage, not its address: on the meta device every address is 0.
        place = (x.untyped_storage()._cdata, x.storage_offset())
        own = weakref.ref(batch)
        identity = (*place, x.shape, x.stride(), x.dtype, x.device, own, layer.patch)
        # The memory of a tensor still alive is not reused: equal identity is equal data.
        self._seen = [entry for entry in self._seen if entry[0]() is not None]
        for _, known, shared in self._seen:
            if known == identity and name not in shared.readers and not shared.added:
                shared.readers.add(name)
                return shared
        shared = SharedInput({name})
        self._seen.append((weakref.ref(x), identity, shared))
        return shared


def _made(y: Tensor, x: Tensor) -> Tensor:
    """Return the tensor that a product was computed into, of which ``y`` may be a view.

    With a bias, nn.Linear of [..., length, d] multiplies flat rows and returns a view of them. An
    operation in place on a view gives it another place in the graph, past the hooks on the old one;
    the gradient of the rows themselves passes by whatever was done to the view.
    """
    base = y._base
    # A view of the input is no product, and others may differentiate through its base.
    if base is None or base is x or base is x._base or type(y) is not Tensor:
        return y
    whole = base.numel() == y.numel() and base.is_contiguous() and y.is_contiguous()
    return base if whole and base.requires_grad else y


def _take(x: Tensor, width: int, rows: slice | Tensor) -> Tensor:
    flat = x.reshape(-1, width)  # [rows, width]
    return flat[rows] if isinstance(rows, slice) else flat[rows.to(x.device)]


def _nothing_more(*_: object) -> None:
    """Ignore what arrives after the hooks were removed."""
