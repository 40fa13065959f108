"""Modules that are one linear map: nn.Linear, its quantised subclasses, transformers' Conv1D."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from curvfast.model.layer import (
    LinearLayer,
    Observer,
    Part,
    Product,
    Removable,
    outside_graphs,
    why_no_weight,
    why_unwritable,
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

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        seen = observer.on_product(Product(x, y, (Part(layer.name),)))
        return None if seen is y else seen

    return layer.module.register_forward_hook(outside_graphs(after), with_kwargs=True)
