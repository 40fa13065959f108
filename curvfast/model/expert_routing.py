"""Observation of the products of a mixture's experts, and of the tokens routed to each.

The module's forward is watched by a torch function mode that calls every function unchanged. Two
series of numbers travel along: whatever picks rows of the tokens picks the same of their positions,
and whatever picks slices of a stacked weight picks the same of the experts. So each product can be
assigned to its expert under all of transformers' experts implementations. At the end the products
are compared with the routing: if one was missed or misread, an error is raised.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from curvfast.errors import CoverageError
from curvfast.model.experts import ExpertLayer
from curvfast.model.hooking import Removable, in_transform, outside_graphs, watch_forward
from curvfast.model.layer import Observer, Part, Product

_PICKS = ("__getitem__", "index_select", "repeat_interleave")
_PRODUCTS = (
    "linear", "matmul", "__matmul__", "mm", "bmm", "_grouped_mm", "grouped_mm",
    "grouped_mm_fallback",
)  # fmt: skip
_Groups = Sequence[tuple[int, slice | Tensor]]


@dataclass
class _Weights:
    """The weight operand of a product: a slice, some slices, or the whole stack."""

    leaf: str
    experts: int | Tensor | None


class Routing(TorchFunctionMode):
    """A torch function mode that observes one forward of an experts module."""

    def __init__(
        self,
        layers: Mapping[tuple[str, int], ExpertLayer],
        tokens: Tensor,
        routing: Tensor,
        observer: Observer,
    ) -> None:
        """Store the arguments of the forward.

        Args:
            layers: The chosen layers, by parameter and expert.
            tokens: [..., d].
            routing: Experts of each token, int [tokens, k]; a number past the last means none.
            observer: Is shown every product of a chosen layer.
        """
        super().__init__()
        first = next(iter(layers.values()))
        self._layers, self._observer, self._tokens = layers, observer, tokens
        leaves = dict.fromkeys(leaf for leaf, _ in layers)
        self._stacks = {leaf: getattr(first.module, leaf).detach() for leaf in leaves}
        self._routing = routing.detach().reshape(tokens.shape[:-1].numel(), -1).cpu()
        self._positions: Tensor | None = None
        # Unbound: a bound method here would keep the tokens alive until a cycle is collected.
        self._on_pick = outside_graphs(Routing._follow)
        self._on_product = outside_graphs(Routing._multiplied)
        self._picked: list[tuple[weakref.ref[Tensor], str, Tensor]] = []
        count = len(next(iter(self._stacks.values())))
        self._counts = {
            leaf: torch.zeros(count, dtype=torch.int64, device="cpu") for leaf in self._stacks
        }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        y = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _PICKS:
            self._on_pick(self, func, args, kwargs, y)
        elif name in _PRODUCTS:
            y = self._on_product(self, args, kwargs, y)
        return y

    def finish(self) -> None:
        """Check that the observed products are those of the routing; report experts without tokens.

        Raises:
            CoverageError: If they are not.
        """
        for leaf, counts in self._counts.items():
            routed = self._routing.flatten()
            routed = routed[(routed >= 0) & (routed < len(counts))].bincount(minlength=len(counts))
            if not torch.equal(routed, counts):
                layer = next(iter(self._layers.values()))
                config = getattr(layer.module, "config", None)
                raise CoverageError(
                    f"{int(routed.sum())} tokens were routed to the experts of "
                    f"{layer.name.rsplit('.', 2)[0]!r}, and {leaf!r} was seen to multiply "
                    f"{int(counts.sum())}: {type(layer.module).__name__} with "
                    f"experts_implementation={getattr(config, '_experts_implementation', None)!r} "
                    "does not multiply in a way that can be followed. Call "
                    "model.set_experts_implementation('eager') before, or leave the experts out of "
                    "layers="
                )
        counted = {leaf: counts.tolist() for leaf, counts in self._counts.items()}
        for (leaf, expert), layer in self._layers.items():
            if not counted[leaf][expert]:
                self._observer.on_no_tokens(layer.name)

    def _follow(self, func: Callable[..., Any], args: Any, kwargs: Any, picked: Tensor) -> None:
        try:
            source = args[0]
            if _same(source, self._tokens):
                positions = torch.arange(source.shape[:-1].numel(), device=source.device)
                positions = func(positions.view(source.shape[:-1]), *args[1:], **kwargs)
                self._positions = positions.flatten().cpu()
                return
            for leaf, stack in self._stacks.items():
                if _same(source, stack) and picked.dim() == 3:
                    numbers = torch.arange(len(stack), device=source.device)
                    experts = func(numbers, *args[1:], **kwargs).cpu()
                    self._picked.append((weakref.ref(picked), leaf, experts))
        except (IndexError, RuntimeError):
            # Picked along another axis too: the result is not understood, and refused later.
            self._positions = None

    def _multiplied(self, args: Any, kwargs: Any, y: Tensor) -> Tensor:
        operands = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        if len(operands) < 2:
            return y
        weights = self._weights(operands[1])
        x = operands[0]
        if weights is None and (weights := self._weights(operands[0])) is not None:
            x = operands[1]
        positions = self._positions
        if weights is None or positions is None or len(positions) != x.shape[0]:
            return y
        groups = _groups(weights.experts, operands)
        if not self._count(weights.leaf, groups, positions):
            return y
        parts = []
        for expert, rows in groups:
            layer = self._layers.get((weights.leaf, expert))
            if layer is not None:
                parts.append(Part(layer.name, rows, positions[rows], self._tokens.shape[:-1]))
        return self._observer.on_product(Product(x, y, tuple(parts))) if parts else y

    def _count(self, leaf: str, groups: _Groups, positions: Tensor) -> bool:
        """Count the rows of a product, if every one is of a token routed to its expert."""
        owners = torch.full_like(positions, -1)
        for expert, rows in groups:
            owners[rows] = expert
        owned = owners >= 0
        if not ((self._routing[positions] == owners[:, None]).any(-1) | ~owned).all():
            return False
        counts = self._counts[leaf]
        counts += owners[owned].bincount(minlength=len(counts))
        return True

    def _weights(self, operand: Tensor) -> _Weights | None:
        for known, leaf, experts in self._picked:
            if known() is operand:
                return _Weights(leaf, experts)
        for leaf, stack in self._stacks.items():
            begin = operand.data_ptr() - stack.data_ptr()
            stride = stack.stride(0) * stack.element_size()
            if operand.dtype != stack.dtype or not 0 <= begin < len(stack) * stride:
                continue
            if operand.dim() == 3 and operand.numel() == stack.numel():
                return _Weights(leaf, None)
            if operand.dim() == 2 and operand.numel() == stack[0].numel() and begin % stride == 0:
                return _Weights(leaf, begin // stride)
        return None


def _groups(experts: int | Tensor | None, operands: list[Tensor]) -> _Groups:
    """Return each expert's rows of a product, given its weight operand."""
    if isinstance(experts, int):
        return [(experts, slice(None))]
    if experts is not None:
        order = experts.argsort(stable=True)
        return [(e, order[rows]) for e, rows in _between(experts.bincount().cumsum(0).tolist())]
    # A whole stack comes with the ends of the experts' rows, or is not understood.
    return _between(operands[2].tolist()) if len(operands) > 2 else []


def _between(ends: list[int]) -> list[tuple[int, slice]]:
    starts = [0, *ends]
    return [(e, slice(starts[e], end)) for e, end in enumerate(ends) if end > starts[e]]


def _same(one: Tensor, two: Tensor) -> bool:
    """Return whether one tensor is the other, or a view of all its rows."""
    return (
        one.data_ptr() == two.data_ptr()
        and one.numel() == two.numel()
        and one.dim() > 0
        and one.shape[-1] == two.shape[-1]
        and one.dtype == two.dtype
    )


@dataclass
class _Watch:
    """The hooks on one experts module."""

    layers: Mapping[tuple[str, int], ExpertLayer]
    observer: Observer
    hooks: Removable | None = None
    running: Routing | None = None

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.abandon()
        if self.observer.paused():
            return
        if in_transform():
            for layer in self.layers.values():
                self.observer.on_transformed(layer.name)
            return
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        tokens = next((t for t in given if t.is_floating_point()), None)
        routing = next((t for t in given if t.dtype in (torch.int64, torch.int32)), None)
        if tokens is None or routing is None:
            raise CoverageError(
                f"{type(module).__name__} is not called with tokens and the experts of each, so "
                "which tokens are whose is not known; leave the experts out of layers="
            )
        if not tokens.numel():
            return
        self.running = Routing(self.layers, tokens, routing, self.observer)
        self.running.__enter__()  # type: ignore[no-untyped-call]

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        running = self.running
        self.abandon()
        # No output: the forward raised, as a checkpoint does that has recomputed enough.
        if running is not None and output is not None:
            running.finish()

    def abandon(self) -> None:
        """Leave the mode, which a forward that a KeyboardInterrupt ended did not."""
        if self.running is not None:
            self.running.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self.running = None

    def remove(self) -> None:
        """Remove the hooks."""
        self.abandon()
        if self.hooks is not None:
            self.hooks.remove()


def watch_experts(layers: list[ExpertLayer], observer: Observer) -> Removable:
    """Show the products of an experts module, of which ``layers`` were chosen, to ``observer``."""
    module = layers[0].module
    watch = _Watch({(layer.leaf, layer.expert): layer for layer in layers}, observer)
    watch.hooks = watch_forward(module, watch.leave, before=watch.enter, always=True, prepend=True)
    return watch
