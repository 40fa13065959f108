"""patched(): a context manager that applies patches temporarily."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from curvfast.editing import restore
from curvfast.errors import InputError
from curvfast.layers import linear_layers
from curvfast.writing.patch import Patch


@contextmanager
def patched(model: nn.Module, patches: Sequence[Patch], *, strength: float = 1.0) -> Iterator[None]:
    """Apply patches inside a ``with`` block; afterwards the weights are the same, bit for bit.

    The patched weights are held twice inside the block.

    Args:
        model: The model the patches were made of, in their dtype; changed in place.
        patches: Applied in this order, each to the result of those before it.
        strength: α, of W + α (W' − W) with W' the result of all patches: 1 is W' to the bit, 0
            leaves every bit, below 0 what they remove is amplified.

    Yields:
        Nothing.

    Raises:
        InputError: If the strength is not finite, or a weight is quantised or of another layout.
        PatchMismatch: If a weight is not the one that a patch was made from.
        LayerNotFound: If a layer shares its weight with another module.
    """
    if not math.isfinite(strength):
        raise InputError(
            f"strength={strength}: pass the α of W + α (W' − W), such as 1 for the patches, 0.5 "
            "for half of them, or a negative number to amplify what they remove"
        )
    there = linear_layers(model)
    names = dict.fromkeys(name for patch in patches for name in patch.layers)
    saved = [(there[name], there[name].stored().clone()) for name in names if name in there]
    try:
        for patch in patches:
            patch.apply(model)
        if strength != 1:
            for layer, original in saved:
                _extrapolate(layer.stored(), original, strength)
        yield
    finally:
        restore(saved)


@torch.no_grad()
def _extrapolate(weight: Tensor, original: Tensor, strength: float) -> None:
    """Replace W' by W + α (W' − W), rounded once."""
    whole = torch.lerp(original.double(), weight.double(), strength)
    weight.copy_(whole if strength else original)
