"""Layer families: which modules are linear maps, and how their calls are observed."""

from __future__ import annotations

from collections.abc import Iterable

from curvfast.model.expert_routing import watch_experts
from curvfast.model.experts import ExpertLayer
from curvfast.model.hooking import Removable, outside_graphs, watch_forward
from curvfast.model.layer import LinearLayer, Observer, Part, Product
from curvfast.model.linear import watch_module
from curvfast.model.refusals import unsupported_reason

__all__ = [
    "ExpertLayer",
    "LinearLayer",
    "Observer",
    "Part",
    "Product",
    "Removable",
    "outside_graphs",
    "unsupported_reason",
    "watch",
    "watch_forward",
]


def watch(layers: Iterable[LinearLayer], observer: Observer) -> list[Removable]:
    """Register hooks that pass every product of the layers to ``observer``.

    Args:
        layers: The chosen layers.
        observer: Called with each product in its forward.

    Returns:
        Handles that remove the hooks.
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
