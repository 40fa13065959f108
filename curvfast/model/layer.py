"""The common interface of all layer families: a linear map, and the observation of its calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from curvfast.distributed import gathered, refuse_layout, write_
from curvfast.errors import InputError
from curvfast.model.linearity import why_other_map

PARAMETRISED = "parametrised: its weight is computed anew in every call, so no edit would last"
FLATTENED = (
    "flattened: FullyShardedDataParallel keeps its weight in one parameter with others; wrap the "
    "model with use_orig_params=True, or use torch.distributed.fsdp.fully_shard"
)
_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LinearLayer:
    """A linear map of the model: y = x Wᵀ + b with W [d_out, d_in]."""

    name: str
    module: nn.Module
    d_in: int
    d_out: int
    transposed: bool = False
    """Whether the weight is stored as [d_in, d_out], as by Conv1D of GPT-2."""
    leaf: str = "weight"
    """The module's name for the parameter."""
    kind: str = "other"
    """``"mlp"``, ``"attention"``, or a kind that is left out unless the layer is named."""
    unwritable: str | None = None
    """Why the weight cannot be edited, if it cannot."""
    patch: tuple[int, ...] | None = None
    """Extent of the patches of its input that are its rows; None: the last dimension is a row."""

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the weight, as the module stores it."""
        own = self.module._parameters.get(self.leaf)
        # A property of that name would compute another tensor; FSDP1 keeps a view elsewhere.
        return getattr(self.module, self.leaf) if own is None else own  # type: ignore[no-any-return]

    @property
    def sliced(self) -> bool:
        """Whether the weight is a slice of the parameter, as one expert's is."""
        return False

    def stored(self) -> Tensor:
        """Return the weight as it is stored, a view without gradient."""
        return self.parameter.detach()

    def matrix(self) -> Tensor:
        """Return the weight as W [d_out, d_in] without gradient, where possible a view.

        A sharded weight is gathered, which every rank must then do.

        Raises:
            InputError: If it cannot be edited.
        """
        self.require_writable()
        stored = gathered(self.stored())
        return stored.T if self.transposed else stored

    def write(self, new: Tensor) -> None:
        """Replace the weight by W [d_out, d_in], in place.

        Raises:
            InputError: If it cannot be edited.
        """
        self.require_writable()
        write_(self.stored(), self.as_stored(new))

    def as_stored(self, new: Tensor) -> Tensor:
        """Return W [d_out, d_in] in the shape and dtype in which the weight is stored."""
        stored = self.stored()
        return (new.T if self.transposed else new).reshape(stored.shape).to(stored.dtype)

    def require_writable(self) -> None:
        """Check that the weight can be edited, and is what the module multiplies by.

        Raises:
            InputError: If it cannot, or is not.
        """
        refusal = self.why_read_only()
        if refusal:
            raise InputError(f"layer {self.name!r} cannot be edited: {refusal}")

    def why_read_only(self) -> str | None:
        """Return the reason why the layer is measured and never edited, or None."""
        return self.unwritable or why_other_map(self)

    def require_editable(self) -> None:
        """Make sure that the weight can be edited in place.

        Raises:
            InputError: If it is stored quantised, or sharded in a way that is not supported.
        """
        self.require_writable()
        refuse_layout(f"the weight of layer {self.name!r}", self.parameter, sliced=self.sliced)

    def inputs(self, x: Tensor) -> Tensor:
        """Return the module's input as rows, [..., d_in]."""
        return x if x.dim() > 1 else x[None]

    def gradients(self, g: Tensor) -> Tensor:
        """Return the gradient of the module's output as rows, [..., d_out]."""
        return g if g.dim() > 1 else g[None]


@dataclass(frozen=True, eq=False)
class Part:
    """The rows of one product that belong to one layer."""

    layer: str
    rows: slice | Tensor | None = None
    """Which rows of x and y [rows, features]; None where x and y are this layer's alone."""
    positions: Tensor | None = None
    """int64 on the CPU: for each of those rows, its position in the batch; None: as it stands."""
    of: torch.Size | None = None
    """Leading shape of the positions, where they are given."""


@dataclass(frozen=True, eq=False)
class Product:
    """One call y = x Wᵀ, of one layer or of several that are stacked."""

    x: Tensor
    y: Tensor
    parts: tuple[Part, ...]
    alone: bool = True
    """Whether the module returned nothing beside y that may have been made of it."""


class Observer(Protocol):
    """An observer of the calls of layers."""

    def paused(self) -> bool:
        """Return, at the start of a forward, whether its products need not be observed."""

    def on_product(self, product: Product) -> Tensor:
        """Record a product; return the y that the forward continues with."""

    def on_no_tokens(self, layer: str) -> None:
        """Record that a forward had no row for a layer, as of an expert without tokens."""

    def on_unread(self, layer: str, reason: str) -> None:
        """Record that a call was no product of rows that could be read, and why."""

    def on_transformed(self, layer: str) -> None:
        """Record that a call ran inside a transform of ``torch.func``, and was left alone."""


def why_no_weight(module: nn.Module) -> str | None:
    """Return the reason why ``module`` has no usable parameter ``weight``, or None."""
    weight = module._parameters.get("weight")
    if weight is None:
        return FLATTENED if is_flattened(module) else PARAMETRISED
    if is_lazy(weight):
        return "lazy: it has no weight before its first call; call the model once"
    return None


def is_flattened(module: nn.Module) -> bool:
    """Return whether FullyShardedDataParallel replaced the module's parameters by a flat one."""
    # Both marks are FSDP's own, put on every module it manages, for the compiler.
    managed = getattr(module, "_is_fsdp_managed_module", False)
    whole = getattr(module, "_fsdp_use_orig_params", True)
    return bool(managed) and not whole and isinstance(vars(module).get("weight"), Tensor)


def why_unwritable(weight: nn.Parameter, shape: tuple[int, ...]) -> str | None:
    """Return the reason why a weight, expected in ``shape``, cannot be edited, or None."""
    foreign = type(weight.data).__module__.startswith("torchao")
    if tuple(weight.shape) == shape and weight.dtype in _PLAIN and not foreign:
        return None
    return (
        f"its weight is stored as {str(weight.dtype).removeprefix('torch.')} {list(weight.shape)} "
        f"({type(weight).__name__}, quantised or sharded), not as {list(shape)} floats; edit the "
        "model as it was before: these factors fit it"
    )
