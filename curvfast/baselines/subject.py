"""ForgetModel: the weights that a baseline may change, written all or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curvfast.adapters import LinearLayer
from curvfast.baselines.report import LayerChange
from curvfast.distributed import is_sharded_model
from curvfast.edit_plan import relative_change
from curvfast.errors import InputError, NonFiniteError
from curvfast.layers import LayerSpec, select
from curvfast.provenance import unwrap


@dataclass(frozen=True, eq=False)
class ForgetModel:
    """An unwrapped model, and its layers that may change."""

    model: nn.Module
    layers: Mapping[str, LinearLayer]

    @property
    def device(self) -> torch.device:
        """Device of the model's inputs."""
        return next(self.model.parameters()).device

    def weights(self) -> dict[str, Tensor]:
        """Return each layer's weight as it is stored: views without gradient."""
        return {name: layer.stored() for name, layer in self.layers.items()}

    def commit(self, new: Mapping[str, Tensor]) -> tuple[LayerChange, ...]:
        """Write weights, given in their stored shapes, as :meth:`rewrite` does.

        Returns:
            What changed, layer by layer.

        Raises:
            NonFiniteError: If a new weight is NaN or infinite; none is written then.
        """
        for name, weight in new.items():
            if not bool(torch.isfinite(weight).all()):
                raise NonFiniteError(
                    f"layer {name!r} would get weights that are NaN or infinite, so none was "
                    "written; lower the learning rate or the number of epochs"
                )

        def write() -> None:
            for name, weight in new.items():
                self.layers[name].stored().copy_(weight)

        return self.rewrite(write)

    def rewrite(self, write: Callable[[], object]) -> tuple[LayerChange, ...]:
        """Call ``write``; if it raises, restore all weights, bit for bit.

        Returns:
            The changes, layer by layer.
        """
        before = {name: weight.clone() for name, weight in self.weights().items()}
        try:
            write()
            return tuple(
                _change(name, before[name], after) for name, after in self.weights().items()
            )
        except BaseException:
            for name, weight in self.weights().items():
                weight.copy_(before[name])
            raise


def choose(model: nn.Module, layers: LayerSpec) -> ForgetModel:
    """Return the model and the layers that match ``layers``, after checking that all are writable.

    Args:
        model: Any module.
        layers: Which linear layers, as in :func:`curvfast.collect`.

    Raises:
        LayerNotFound: If nothing matches.
        InputError: If a weight is quantised or sharded.
    """
    if is_sharded_model(model):
        raise InputError(
            "the model's weights are sharded over processes; pass it whole: before fully_shard, "
            "or from its gathered checkpoint"
        )
    chosen = select(model, layers)
    for layer in chosen.values():
        layer.require_writable()
    return ForgetModel(unwrap(model), chosen)


def wide(tensor: Tensor) -> torch.dtype:
    """Return the working dtype for ``tensor``: float32, or float64 if it is."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _change(name: str, before: Tensor, after: Tensor) -> LayerChange:
    different = before != after
    zeroed = different & (after == 0)
    return LayerChange(
        name,
        weights=before.numel(),
        changed=int(different.sum()) / before.numel(),
        zeroed=int(zeroed.sum()) / before.numel(),
        relative_change=relative_change(before, after.to(wide(after))),
    )
