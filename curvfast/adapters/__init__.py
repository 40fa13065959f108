"""Families of linear layers, and how their calls are seen."""

from __future__ import annotations

from collections.abc import Iterable

from curvfast.adapters.experts import ExpertLayer
from curvfast.adapters.layer import LinearLayer, Observer, Part, Product, Removable, outside_graphs
from curvfast.adapters.linear import watch_module
from curvfast.adapters.refusals import refusal
from curvfast.adapters.routing import watch_experts

__all__ = [
    "ExpertLayer",
    "LinearLayer",
    "Observer",
    "Part",
    "Product",
    "Removable",
    "outside_graphs",
    "refusal",
    "watch",
]


def watch(layers: Iterable[LinearLayer], observer: Observer) -> list[Removable]:
    """Show every product of the layers to ``observer``, by hooks on their modules.

    Args:
        layers: The chosen layers.
        observer: Is shown each product in its forward.

    Returns:
        What takes the hooks off.
    """
    handles: list[Removable] = []
    mixtures: dict[int, list[ExpertLayer]] = {}
    for layer in layers:
        if isinstance(layer, ExpertLayer):
            mixtures.setdefault(id(layer.module), []).append(layer)
        else:
            handles.append(watch_module(layer, observer))
    handles += [watch_experts(group, observer) for group in mixtures.values()]
    return handles
