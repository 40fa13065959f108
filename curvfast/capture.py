"""Capture: the inputs and output gradients of linear layers, seen by hooks that change nothing.

The input a of a layer is handed to autograd's own keeping, and read back when the gradient g of
that very call arrives. So a and g always belong together: under activation checkpointing,
re-entrant or not, a is recomputed rather than held, and a forward that is recomputed, or never
followed by a backward, counts nothing. Only where we drive the passes ourselves, and each forward
is known to run once and to be followed by its backward, is a counted at once and let go.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from curvfast.errors import CoverageError
from curvfast.layers import LinearLayer
from curvfast.rows import Batch


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
    batch: Batch
    shared: SharedInput
    x: Tensor | None
    """[..., d_in]; None if it was counted in the forward"""
    g: Tensor
    """[..., d_out], in the units of the caller's loss"""


@dataclass
class Calls:
    """How often a layer was seen, for the errors that explain a missing gradient."""

    forward: int = 0
    without_grad: int = 0
    gradients: int = 0


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


def outside_graphs(hook: Callable[..., None]) -> Callable[..., None]:
    """Return ``hook``, kept out of compiled graphs where there can be any."""
    # torch.compiler.disable loads the compiler, tens of megabytes, so only beside a compiled model.
    return torch.compiler.disable(hook) if "torch._dynamo" in sys.modules else hook


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context without autocast; a device that has none, such as meta, needs nothing."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@dataclass
class _Call:
    """What the forward of a layer leaves for its gradient."""

    layer: str
    batch: Batch
    shared: SharedInput
    kept: Any
    """The autograd node that keeps the input; None once it was read, or in a driven pass."""
    done: bool = False


class Capture:
    """Hooks on the chosen layers of a model."""

    def __init__(
        self,
        layers: dict[str, LinearLayer],
        current_batch: Callable[[], Batch],
        on_arrival: Callable[[Arrival], None],
        on_input: Callable[[str, Batch, SharedInput, Tensor], None],
        *,
        share_inputs: bool,
        driven: bool,
    ) -> None:
        """Set up; :meth:`attach` registers the hooks.

        Args:
            layers: Layers by name.
            current_batch: Tells which batch a forward running now belongs to.
            on_arrival: Called with every complete call, in its backward.
            on_input: Called with (layer, batch, shared, x) in the forward of a driven pass.
            share_inputs: Whether layers that read one tensor are told so.
            driven: Whether each forward runs once and its backward follows. Inputs are then counted
                in the forward, and an output without gradient becomes the leaf at which the
                backward ends: nothing below the first layer of a frozen model needs one.
        """
        self.calls = {name: Calls() for name in layers}
        self._current_batch = current_batch
        self._on_arrival = on_arrival
        self._on_input = on_input
        self._share_inputs = share_inputs
        self._driven = driven
        self._seen: list[tuple[weakref.ref[Tensor], tuple[Any, ...], SharedInput]] = []
        self._pending: tuple[str, Batch, SharedInput, Tensor, int] | None = None
        self._layers = layers
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Put the hooks on."""
        for name, layer in self._layers.items():
            hook = outside_graphs(partial(self._after_forward, name))
            self._handles.append(layer.module.register_forward_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Take every hook off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()
        self._pending = None

    def forget(self) -> None:
        """Let go of the callbacks: what arrives later counts nothing, and keeps nothing alive."""
        self._current_batch = self._on_arrival = self._on_input = _nothing_more  # type: ignore[assignment]

    def flush(self) -> None:
        """Count the input last read in a driven pass: its readers are known now."""
        if self._pending is None:
            return
        (name, batch, shared, x, version), self._pending = self._pending, None
        if x._version != version:
            raise CoverageError(
                f"the input of {name!r} was modified in place before it was counted; leave the "
                "layer out, or make the operation after it out of place"
            )
        shared.added = True
        with torch.no_grad(), _no_autocast(x.device):
            self._on_input(name, batch, shared, x)

    def _after_forward(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor
    ) -> None:
        batch = self._current_batch()
        if batch.idle:
            return
        calls = self.calls[name]
        calls.forward += 1
        if not torch.is_grad_enabled() or not (y.requires_grad or self._driven):
            calls.without_grad += 1
            return
        if not y.requires_grad:
            y.requires_grad_()
        x = args[0] if args else kwargs["input"]
        shared = self._shared(name, x, batch)
        kept = None
        if not self._driven:
            anchor = torch.empty(0, device=x.device, requires_grad=True)
            kept = _Keep.apply(anchor, x.detach()).grad_fn  # type: ignore[no-untyped-call]
        elif self._pending is None or self._pending[2] is not shared:
            self.flush()
            self._pending = (name, batch, shared, x.detach(), x._version)
        y.register_hook(partial(self._on_gradient, _Call(name, batch, shared, kept)))

    def _on_gradient(self, call: _Call, g: Tensor) -> None:
        if call.done:
            raise CoverageError(
                f"a second backward ran through one forward of {call.layer!r} (retain_graph=True), "
                "which would count its rows twice; sum the losses and run one backward"
            )
        x = None
        if call.kept is not None:
            try:
                (x,) = call.kept.saved_tensors
            except RuntimeError as error:
                raise CoverageError(
                    f"the input of {call.layer!r} is gone when its gradient arrives: {error}. The "
                    "likely cause is an in-place operation on the tensor the layer read; leave the "
                    "layer out"
                ) from error
        # The graph may outlive the backward in the caller's loss: hold nothing through it.
        call.kept, call.done = None, True
        self.calls[call.layer].gradients += 1
        with torch.no_grad(), _no_autocast(g.device):
            self._on_arrival(Arrival(call.layer, call.batch, call.shared, x, g))

    def _shared(self, name: str, x: Tensor, batch: Batch) -> SharedInput:
        """Return the record of the tensor this call reads: one for all layers that read it."""
        if not self._share_inputs:
            return SharedInput({name})
        # The storage, not its address: on the meta device every address is 0.
        place = (x.untyped_storage()._cdata, x.storage_offset())
        identity = (*place, x.shape, x.stride(), x.dtype, x.device, batch)
        # A tensor still alive cannot have lent its memory to another: equal identity is equal data.
        self._seen = [entry for entry in self._seen if entry[0]() is not None]
        for _, known, shared in self._seen:
            if known == identity and name not in shared.readers and not shared.added:
                shared.readers.add(name)
                return shared
        shared = SharedInput({name})
        self._seen.append((weakref.ref(x), identity, shared))
        return shared


def _nothing_more(*_: object) -> None:
    """Take in what arrives after the hooks were removed, and count nothing."""
