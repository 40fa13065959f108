"""Patch embeddings: convolutions with stride equal to the kernel size and no padding.

Such a convolution is one linear map on each patch: W is the kernel [d_out, channels · height ·
width], and a row is a patch, flattened in that order.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from curvfast.distributed import gathered
from curvfast.model.layer import LinearLayer, why_no_weight, why_unwritable

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class PatchLayer(LinearLayer):
    """A patch embedding as a linear layer: each patch is a row."""

    def matrix(self) -> Tensor:
        """Return the kernel as W [d_out, d_in] without gradient, where possible a view.

        Raises:
            InputError: If it cannot be edited.
        """
        self.require_writable()
        return gathered(self.stored()).reshape(self.d_out, self.d_in)

    def inputs(self, x: Tensor) -> Tensor:
        """Return the patches of images [images, channels, ...] as [images, *grid, d_in]."""
        assert self.patch is not None
        n = len(self.patch)
        x = x if x.dim() == n + 2 else x[None]
        for axis, extent in enumerate(self.patch, start=2):
            x = x.unfold(axis, extent, extent)
        return x.movedim(1, n + 1).flatten(n + 1)

    def gradients(self, g: Tensor) -> Tensor:
        """Return a gradient [images, d_out, *grid] as [images, *grid, d_out]."""
        assert self.patch is not None
        g = g if g.dim() == len(self.patch) + 2 else g[None]
        return g.movedim(1, -1)


def patch_layer(name: str, module: nn.Module) -> list[LinearLayer]:
    """Return the layer that ``module`` is, if it is one of this family."""
    weight = module._parameters.get("weight")
    if not isinstance(module, _CONVOLUTIONS) or weight is None or why_not(module):
        return []
    shape = (module.out_channels, module.in_channels, *module.kernel_size)
    refusal = why_unwritable(weight, shape)
    patch = tuple(module.kernel_size)
    return [
        PatchLayer(name, module, math.prod(shape[1:]), shape[0], unwritable=refusal, patch=patch)
    ]


def why_not(module: nn.Module) -> str | None:
    """Return the reason why a convolution is not supported, or None."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return None
    if not isinstance(module, _CONVOLUTIONS):
        return f"{type(module).__name__}: a transposed convolution is not one map on each patch"
    missing = why_no_weight(module)
    if missing:
        return missing
    ones = (1,) * len(module.kernel_size)
    faults = [
        f"{name}={value!r}"
        for name, value, wrong in (
            ("stride", module.stride, module.stride != module.kernel_size),
            ("padding", module.padding, module.padding not in ("valid", (0,) * len(ones))),
            ("dilation", module.dilation, module.dilation != ones),
            ("groups", module.groups, module.groups != 1),
        )
        if wrong
    ]
    if not faults:
        return None
    return (
        f"convolution with kernel_size={module.kernel_size} and {', '.join(faults)}: only patch "
        "embeddings (stride = kernel_size, no padding, dilation or groups) are one map on each "
        "patch"
    )
