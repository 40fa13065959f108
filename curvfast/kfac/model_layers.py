"""The layers of a model that an eigenbasis describes, after a check that it fits the model."""

from __future__ import annotations

from torch import nn

from curvfast.errors import BasisMismatch, LayerNotFound
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.model.families import LinearLayer
from curvfast.model.layers import LayerSpec, linear_layers, matches


def basis_layers(
    model: nn.Module, basis: Eigenbasis, layers: LayerSpec | None
) -> dict[str, LinearLayer]:
    """Return the layers of a model that a basis describes.

    Args:
        model: The model the basis was measured on.
        basis: Eigenbases by layer name.
        layers: Which of them; None means all.

    Returns:
        Layers by name, in the order of the basis.

    Raises:
        BasisMismatch: If the model lacks a layer, or it has other widths.
        LayerNotFound: If ``layers`` matches nothing in the basis.
    """
    there = linear_layers(model)
    missing = [name for name in basis if name not in there]
    if missing:
        raise BasisMismatch(
            f"the basis has layer {missing[0]!r} and {len(missing) - 1} more that this "
            f"{type(model).__name__} lacks; it was measured on another model, or on one with other "
            "names (a wrapper around it?)"
        )
    chosen = {n: there[n] for n in basis if layers is None or matches(layers, there[n])}
    if not chosen:
        raise LayerNotFound(
            f"layers={layers!r} matches none of the basis's layers: "
            f"{', '.join(map(repr, basis)) or 'it is empty'}"
        )
    for name, layer in chosen.items():
        shape = (len(basis[name].values_g), len(basis[name].values_a))
        if shape != (layer.d_out, layer.d_in):
            raise BasisMismatch(
                f"the basis of layer {name!r} is for a weight {shape}, the model's is "
                f"{(layer.d_out, layer.d_in)}: it was measured on another model"
            )
    return chosen
