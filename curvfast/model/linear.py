"""Modules that are one linear map: nn.Linear, its quantised subclasses, transformers' Conv1D."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from curvfast.model.hooking import Removable, in_transform, watch_forward
from curvfast.model.layer import (
    LinearLayer,
    Observer,
    Part,
    Product,
    why_no_weight,
    why_unwritable,
)
from curvfast.model.linearity import equals, fits, forget, look, needs_look

NESTED = (
    "it was called with a nested tensor, whose rows are not those of the batch: make the "
    "nn.TransformerEncoder with enable_nested_tensor=False, or set use_nested_tensor = False on it"
)
FUSED_ATTENTION = "nn.MultiheadAttention multiplies in one fused function: no product is seen"
_CONV1D = "transformers.pytorch_utils.Conv1D"
# nn.MultiheadAttention multiplies by the weight of this one itself and never calls it.
_NEVER_CALLED = nn.modules.linear.NonDynamicallyQuantizableLinear


def linear_layer(name: str, module: nn.Module) -> list[LinearLayer]:
    """Return the layer that ``module`` is, if it is one of this family."""
    weight = module._parameters.get("weight")
    if weight is None or why_not(module):
        return []
    if isinstance(module, nn.Linear):
        d_in, d_out = module.in_features, module.out_features
        # A quantised subclass packs its weight, but maps inputs to outputs as nn.Linear does.
        refusal = why_unwritable(weight, (d_out, d_in))
        return [LinearLayer(name, module, d_in, d_out, unwritable=refusal)]
    if any(f"{c.__module__}.{c.__name__}" == _CONV1D for c in type(module).__mro__):
        d_in, d_out = map(int, weight.shape)
        return [LinearLayer(name, module, d_in, d_out, transposed=True)]
    return []


def why_not(module: nn.Module) -> str | None:
    """Return the reason why a module of this family is not supported, or None."""
    if not isinstance(module, nn.Linear):
        return None
    if isinstance(module, _NEVER_CALLED):
        return FUSED_ATTENTION
    return why_no_weight(module)


def watch_module(layer: LinearLayer, observer: Observer) -> Removable:
    """Register a hook that passes every call of a single-layer module to ``observer``."""
    return watch_forward(layer.module, _Reader(layer, observer).after)


@dataclass(eq=False)
class _Reader:
    """Reads the product off each call of a module: its input, and which output is x Wᵀ + b."""

    layer: LinearLayer
    observer: Observer
    hooks: int = -1
    """How many hooks of others the module had when an output was last compared."""
    place: int | None = None
    """Where in a tuple of several candidates the product is, once known."""

    def after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Show one call to the observer; return the output that the forward goes on with."""
        observer, name = self.observer, self.layer.name
        if observer.paused():
            return None
        if in_transform():
            return observer.on_transformed(name)
        x = args[0] if args and isinstance(args[0], Tensor) else None
        if x is None or x.is_nested or not self._is_input(x):
            given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            if any(t.is_nested for t in given):
                return observer.on_unread(name, NESTED)
            x = next((t for t in given if self._is_input(t)), None)
            if x is None:
                return observer.on_unread(name, self._no_input(given))
        if not x.numel():
            return observer.on_no_tokens(name)
        y = output if fits(x, output, self.layer) else self._among(x, output)
        if isinstance(y, str):
            return observer.on_unread(name, y)
        self._look(module, x, y)
        rows = x if x.dim() > 1 else x[None]
        seen = observer.on_product(Product(rows, y, (Part(name),), alone=_whole(output, y)))
        return None if seen is y else _replaced(output, y, seen)

    def _is_input(self, x: Tensor) -> bool:
        if not x.is_floating_point():
            return False
        if self.layer.patch is None:
            return x.dim() > 0 and x.shape[-1] == self.layer.d_in
        return x.dim() - len(self.layer.patch) in (1, 2)

    def _no_input(self, given: list[Tensor]) -> str:
        shapes = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in given)
        return (
            f"it was called with {shapes or 'no tensor'}, none of which is its input: a float "
            f"tensor [..., {self.layer.d_in}]; leave the layer out of layers="
        )

    def _among(self, x: Tensor, output: Any) -> Tensor | str:
        """Return which of several outputs is the product, or why none is."""
        if not isinstance(output, tuple | list):
            shape = f" {list(output.shape)}" if isinstance(output, Tensor) else ""
            return (
                f"it returned a {type(output).__name__}{shape} for an input {list(x.shape)}: not "
                "one row for each of the input's; leave the layer out of layers="
            )
        found = [i for i, t in enumerate(output) if fits(x, t, self.layer)]
        if self.place not in found:
            equal = (i for i in found if len(found) == 1 or equals(self.layer, x, output[i]))
            self.place = next(equal, None)
        if self.place is None:
            return (
                f"it returned a {type(output).__name__}, and none of its {len(output)} values is x "
                "Wᵀ + b; leave the layer out of layers="
            )
        y: Tensor = output[self.place]
        return y

    def _look(self, module: nn.Module, x: Tensor, y: Tensor) -> None:
        """Compare the output once, and again when a hook was added that may change it."""
        count = len(module._forward_hooks)
        if count == self.hooks:
            return
        first, self.hooks = self.hooks < 0, count
        if first:
            forget(module)
        if needs_look(module):
            look(self.layer, x, y)


def _whole(output: Any, y: Tensor) -> bool:
    """Return whether no other output may have been made of ``y``."""
    return output is y or not any(
        isinstance(t, Tensor) and t.is_floating_point() and not isinstance(t, nn.Parameter)
        for t in output
        if t is not y
    )


def _replaced(output: Any, y: Tensor, seen: Tensor) -> Any:
    """Return the output with ``seen`` where ``y`` was."""
    if output is y:
        return seen
    values = [seen if t is y else t for t in output]
    return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
