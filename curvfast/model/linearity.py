"""Whether a module's output is x Wᵀ + b: by its class, by a call that was seen, or by a trial.

A subclass may normalise, mask, scale or perturb its weight in its forward, and a hook of others may
change what a plain module returns. Factors of such a map are right, but its weight is not what
multiplies, so it is never edited. Seeing costs four rows of the first call, and no wait: whether
they are equal stays on the device until somebody asks.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from curvfast.model.hooking import others_on_output

_ROWS = 4
_PLAIN = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV1D = "transformers.pytorch_utils"
# As torch.testing has them, relative to an output and to the size of its row.
_TOLERANCE = {
    torch.float64: 1e-7, torch.float32: 1.3e-6, torch.float16: 1e-3, torch.bfloat16: 1.6e-2,
}  # fmt: skip
# Of what a long sum may lose beyond that, relative to the norms of its factors.
_ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6}
# An accelerator may multiply float32 in fewer bits, and few rows by another kernel than many.
_ACCELERATED = 5e-3


class LinearMap(Protocol):
    """A module, and what rows its linear map has."""

    @property
    def module(self) -> nn.Module:
        """The module."""

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as [d_in, d_out]."""

    @property
    def leaf(self) -> str:
        """The module's name for the weight."""

    @property
    def patch(self) -> tuple[int, ...] | None:
        """Extent of the patches that are its rows, if they are."""

    @property
    def d_in(self) -> int:
        """Width of a row of the input."""

    @property
    def d_out(self) -> int:
        """Width of a row of the output."""

    def inputs(self, x: Tensor) -> Tensor:
        """Return the module's input as rows, [..., d_in]."""

    def gradients(self, g: Tensor) -> Tensor:
        """Return a tensor of the shape of the module's output as rows, [..., d_out]."""


@dataclass(frozen=True)
class _Sight:
    """What the rows of a call showed, on the module's device."""

    excess: Tensor
    """float []: the largest difference from x Wᵀ + b, b or none; 1 is what rounding may do."""
    telling: Tensor
    """bool []: whether the rows could show a difference: finite, and not all zero."""

    def __or__(self, other: _Sight) -> _Sight:
        if self.excess.device != other.excess.device:
            return other
        one, two = (s.excess.where(s.telling, 0) for s in (self, other))
        return _Sight(torch.maximum(one, two), self.telling | other.telling)

    def found(self) -> float | None:
        """Return the largest difference; None if the rows told nothing. Waits for the device."""
        return float(self.excess) if bool(self.telling) else None


_seen: WeakKeyDictionary[nn.Module, _Sight] = WeakKeyDictionary()


def is_plain(module: nn.Module) -> bool:
    """Return whether the forward of ``module`` is that of torch's, or transformers', own class."""
    # accelerate puts its own forward before the module's, which moves weights and calls it.
    bound = vars(module).get("_old_forward" if "_hf_hook" in vars(module) else "forward")
    forward = type(module).forward if bound is None else getattr(bound, "__func__", bound)
    if isinstance(module, _CONVOLUTIONS):
        base = next(c for c in _CONVOLUTIONS if isinstance(module, c))
        if type(module)._conv_forward is not base._conv_forward:
            return False
    # A property of this name would stand before the parameter.
    if hasattr(type(module), "weight") or "weight" in vars(module):
        return False
    return forward in _PLAIN or (
        getattr(forward, "__qualname__", "") == "Conv1D.forward"
        and getattr(forward, "__module__", "") == _CONV1D
    )


def needs_look(module: nn.Module) -> bool:
    """Return whether only the output of a call can tell what the module computes."""
    return not is_plain(module) or others_on_output(module) > 0


def look(layer: LinearMap, x: Tensor, y: Tensor) -> None:
    """Compare a few rows of a call with x Wᵀ + b, in the dtype of the call, and remember it.

    Args:
        layer: The layer.
        x: Its module's input.
        y: The output.
    """
    sight = _compare(layer, x, y)
    if sight is not None:
        before = _seen.get(layer.module)
        _seen[layer.module] = sight if before is None else before | sight


def forget(module: nn.Module) -> None:
    """Forget what calls of a module showed: it is measured anew."""
    _seen.pop(module, None)


def equals(layer: LinearMap, x: Tensor, y: Tensor) -> bool:
    """Return whether a tensor is x Wᵀ + b as far as a few rows tell. Waits for the device."""
    sight = _compare(layer, x, y)
    found = None if sight is None else sight.found()
    return sight is not None and (found is None or found <= 1)


def why_other_map(layer: LinearMap) -> str | None:
    """Return the reason why the weight of a layer is not what multiplies, or None.

    A module of a class that is not known is tried on random rows too: a low-rank term that was zero
    in the first call may be none now.
    """
    module = layer.module
    name = type(module).__name__
    sight = _seen.get(module)
    seen = None if sight is None else sight.found()
    if seen is not None and not seen <= 1:
        return (
            f"the output of this {name} was seen not to be x Wᵀ + b (its forward, or a hook on it, "
            "changes the weight or the output), so its factors are of another map than its weight's"
        )
    if is_plain(module):
        return None
    tried = _try(layer)
    if tried is False or (tried is None and seen is None):
        found = "is not" if tried is False else "was not seen to be"
        return (
            f"the output of this {name} {found} x Wᵀ + b: its forward is not torch's own; merge "
            "what it does into a plain nn.Linear, or leave the layer out of layers="
        )
    return None


def _compare(
    layer: LinearMap, x: Tensor, y: Tensor, module: nn.Module | None = None
) -> _Sight | None:
    """Return what a few rows show, of a copy of the module if given; None where nothing can."""
    parameters = (module or layer.module)._parameters
    weight, bias = parameters.get(layer.leaf), parameters.get("bias")
    parts = [t for t in (x, y, weight, bias) if t is not None]
    if weight is None or any(t.is_meta or _special(t) for t in parts):
        return None
    with torch.no_grad():
        if layer.patch is not None:
            # A few images are enough; the patches of all would be a copy of them.
            batched = x.dim() == len(layer.patch) + 2
            x, y = (x[:_ROWS], y[:_ROWS]) if batched else (x, y)
        x, y = layer.inputs(x.detach()), layer.gradients(y.detach())
        x, y = (t.reshape(-1, t.shape[-1]) for t in (x, y))
        w = weight.T if layer.transposed else weight.reshape(weight.shape[0], -1)
        if not len(x) or len(x) != len(y) or (y.shape[1], x.shape[1]) != w.shape:
            return None
        chosen = torch.linspace(0, len(x) - 1, min(_ROWS, len(x))).long().tolist()
        x, y = (torch.stack([t[i] for i in chosen]) for t in (x, y))
        # Under the autocast of the call, whose context this still is.
        x = x if torch.is_autocast_enabled(x.device.type) else x.to(w)
        # With the bias or without: some modules hand it on beside the product.
        biases = [None] if bias is None else [None, bias]
        return _equal(x, y, [functional.linear(x, w, b) for b in biases], w)


def _equal(x: Tensor, y: Tensor, either: list[Tensor], w: Tensor) -> _Sight:
    wide = torch.float64 if w.dtype == torch.float64 else torch.float32
    relative = max(_TOLERANCE.get(t.dtype, 1e-7) for t in (x, y, either[0], w))
    if x.device.type != "cpu":
        relative = max(relative, _ACCELERATED)
    x, y = x.to(wide), y.to(wide)
    size = x.norm(dim=1)[:, None] * torch.linalg.vector_norm(w, dim=1, dtype=wide)
    excess = []
    for expected in (t.to(wide) for t in either):
        rms = expected.square().mean(1, keepdim=True).sqrt()
        allowed = relative * (expected.abs() + rms) + _ROUNDING[wide] * size
        allowed = allowed.clamp_min(torch.finfo(wide).tiny)
        excess.append(((y - expected).abs() / allowed).amax())
    smallest = torch.stack(excess).amin()
    return _Sight(smallest, either[0].isfinite().all() & (x != 0).any())


def _special(tensor: Tensor) -> bool:
    """Return whether a tensor is of a kind of its own: sharded, quantised, in a transform."""
    data = tensor.data if isinstance(tensor, nn.Parameter) else tensor
    return type(data) not in (Tensor, nn.Parameter)


def _try(layer: LinearMap) -> bool | None:
    """Return whether the module maps random rows by x Wᵀ + b; None if it cannot be tried."""
    module, weight = layer.module, layer.module._parameters.get(layer.leaf)
    if weight is None or weight.is_meta or _special(weight) or not weight.is_floating_point():
        return None
    own = _outcome(layer, None)
    if own is None or not 0 < own <= 1 or weight.dtype in _ROUNDING or "forward" in vars(module):
        return None if own is None else own <= 1
    # Two bytes hide a change of a per cent: the same module in float32 shows it.
    finer = _outcome(layer, torch.float32)
    return finer is None or finer <= 1


def _outcome(layer: LinearMap, dtype: torch.dtype | None) -> float | None:
    """Return the difference that a trial shows; with a dtype, of the module in it."""
    module = layer.module
    # On a shallow copy with buffers of its own: what a call counts or normalises is not kept.
    twin = module if "forward" in vars(module) else copy.copy(module)
    if twin is not module:
        own = {k: None if b is None else _as(b, dtype).clone() for k, b in module._buffers.items()}
        twin._buffers = own
    if dtype is not None:
        parameters = module._parameters.items()
        twin._parameters = {
            k: None if p is None else nn.Parameter(_as(p.detach(), dtype), requires_grad=False)
            for k, p in parameters
        }
    weight = twin._parameters[layer.leaf]
    assert weight is not None
    width = weight.shape[0] if layer.transposed else weight.shape[1:].numel()
    draws = torch.Generator(device="cpu").manual_seed(0)
    x = torch.randn(_ROWS, width, generator=draws, device="cpu")
    # Of several sizes: a clipped or rounded input shows.
    x *= torch.tensor([0.1, 1.0, 4.0, 16.0], device="cpu")[:, None]
    x = x.to(weight)
    if layer.patch is not None:
        x = x.reshape(_ROWS, *weight.shape[1:])
    kind = weight.device.type
    devices = [] if kind == "cpu" else [weight.device]
    known = torch.amp.is_autocast_available(kind)
    try:
        with (
            torch.no_grad(),
            torch.autocast(kind, enabled=False) if known else nullcontext(),
            torch.random.fork_rng(devices, device_type="cuda" if kind == "cpu" else kind),
        ):
            y = twin.forward(x)
            found = [t for t in (y if isinstance(y, tuple | list) else (y,)) if fits(x, t, layer)]
            sights = [_compare(layer, x, t, twin) for t in found]
            return min((s.found() or 0.0 for s in sights if s is not None), default=None)
    except Exception:
        # Whatever a forward of others raises: it does not take rows and nothing else.
        return None


def _as(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def fits(x: Tensor, y: object, layer: LinearMap) -> bool:
    """Return whether a tensor has the shape of the module's product with x: one row for each."""
    if not isinstance(y, Tensor) or not y.is_floating_point():
        return False
    if layer.patch is None:
        return y.shape == (*x.shape[:-1], layer.d_out)
    channels = -len(layer.patch) - 1
    return y.dim() == x.dim() and y.shape[channels] == layer.d_out
