"""The common interface of all layer families: a linear map, and the observation of its calls."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from curvfast.distributed import gathered, refuse_layout, write_
from curvfast.errors import InputError

PARAMETRISED = "parametrised: its weight is computed anew in every call, so no edit would last"
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
        return getattr(self.module, self.leaf)  # type: ignore[no-any-return]

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
        """Check that the weight can be edited.

        Raises:
            InputError: If it cannot.
        """
        if self.unwritable:
            raise InputError(f"layer {self.name!r} cannot be edited: {self.unwritable}")

    def require_editable(self) -> None:
        """Make sure that the weight can be edited in place.

        Raises:
            InputError: If it is stored quantised, or sharded in a way that is not supported.
        """
        self.require_writable()
        refuse_layout(f"the weight of layer {self.name!r}", self.parameter, sliced=self.sliced)

    def inputs(self, x: Tensor) -> Tensor:
        """Return the module's input as rows, [..., d_in]."""
        return x

    def gradients(self, g: Tensor) -> Tensor:
        """Return the gradient of the module's output as rows, [..., d_out]."""
        return g


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


class Observer(Protocol):
    """An observer of the calls of layers."""

    def idle(self) -> bool:
        """Return, at the start of a forward, whether its products need not be observed."""

    def see(self, product: Product) -> Tensor:
        """Record a product; return the y that the forward continues with."""

    def rest(self, layer: str) -> None:
        """Record that a forward of an expert's module routed no token to it."""


class Removable(Protocol):
    """A hook that can be removed."""

    def remove(self) -> None:
        """Remove the hook."""


def why_no_weight(module: nn.Module) -> str | None:
    """Return the reason why ``module`` has no usable parameter ``weight``, or None."""
    weight = module._parameters.get("weight")
    if weight is None:
        return PARAMETRISED
    if is_lazy(weight):
        return "lazy: it has no weight before its first call; call the model once"
    return None


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


def outside_graphs(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``hook``, excluded from compiled graphs if the compiler is in use."""
    # torch.compiler.disable loads the compiler, tens of megabytes, so only beside a compiled model.
    return torch.compiler.disable(hook) if "torch._dynamo" in sys.modules else hook
