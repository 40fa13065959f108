"""Selection of a model's linear layers: by kind, by name, by predicate, or by a basis.

Names are those of ``model.named_modules()`` without the wrappers of ``torch.compile``, data
parallelism, activation checkpointing and PEFT, so factors measured on a wrapped model fit the bare
one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Protocol

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from curvfast.errors import BasisMismatch, LayerNotFound
from curvfast.model.experts import expert_layers
from curvfast.model.families import LinearLayer, unsupported_reason
from curvfast.model.layer import is_flattened
from curvfast.model.linear import linear_layer
from curvfast.model.patch_embedding import patch_layer

LayerSpec = str | Iterable[str] | Callable[[str, nn.Module], bool]

KINDS = ("mlp", "attention", "all")
LEFT_OUT = {
    "head": "output head",
    "router": "router of a mixture of experts",
    "adapter": "adapter of a PEFT wrapper",
}
"""Kinds that none of :data:`KINDS` takes."""
_ATTENTION = ("attn", "attention")
_MLP = (
    "mlp", "ffn", "feed_forward", "feedforward", "experts", "fc1", "fc2", "intermediate", "output"
)  # fmt: skip
_HEADS = ("lm_head", "embed_out", "classifier", "score", "cls", "qa_outputs", "head")
_WRAPPERS = (
    "module", "_orig_mod", "base_layer", "_checkpoint_wrapped_module", "_fsdp_wrapped_module",
)  # fmt: skip
_PEFT = ["base_model", "model"]
_ROUTER = re.compile(r"gate|router|\w*expert\w*gate")


def bare_name(name: str) -> str:
    """Return a module or parameter name without the components that wrappers add."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(parts[2:] if parts[:2] == _PEFT else parts)


def bare_names(model: nn.Module) -> dict[str, str]:
    """Return the bare name of every module: what ``named_modules()`` says -> without wrappers.

    What PEFT wraps is asked of its wrapper: a model with adapters stands two components down, one
    with a learned prompt stands one, and what is there called ``model`` is its own.
    """
    bare: dict[str, str] = {}
    wrapped: dict[nn.Module, nn.Module] = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        above, _, part = name.rpartition(".")
        parent = modules[above] if name else None
        base = getattr(parent, "get_base_model", None) if part == "base_model" else None
        if callable(base):
            wrapped[module] = base()
        hidden = (
            not part or part in _WRAPPERS or module in wrapped or wrapped.get(parent) is module  # type: ignore[arg-type]
        )
        outer = bare.get(above, "")
        bare[name] = outer if hidden else f"{outer}.{part}".removeprefix(".")
    return bare


def linear_layers(model: nn.Module) -> dict[str, LinearLayer]:
    """Return every supported linear layer of ``model`` by bare name, in module order."""
    modules = dict(model.named_modules())
    found = {}
    bare = bare_names(model)
    for full_name, module in modules.items():
        for layer in layers_of(bare[full_name], module):
            found[layer.name] = replace(layer, kind=_kind(layer.name, full_name, modules))
    return found


def layers_of(name: str, module: nn.Module) -> list[LinearLayer]:
    """Return the layers whose weights ``module`` itself holds, ``name`` being its name."""
    if not module._parameters:
        return []
    return linear_layer(name, module) or patch_layer(name, module) or expert_layers(name, module)


def refused_modules(model: nn.Module) -> dict[str, str]:
    """Return every module that itself holds parameters and is no linear layer: name -> reason."""
    bare = bare_names(model)
    return {
        bare[full_name]: unsupported_reason(module)
        for full_name, module in model.named_modules()
        if (module._parameters or is_parametrized(module) or is_flattened(module))
        and not layers_of("", module)
    }


def select(model: nn.Module, spec: LayerSpec) -> dict[str, LinearLayer]:
    """Return the layers that match ``spec``.

    Args:
        model: Any module.
        spec: ``"mlp"``, ``"attention"`` or ``"all"`` (none of which takes output heads, routers,
            or the adapters of PEFT); a glob or several on layer names; or a predicate
            ``(name, module) -> bool``.

    Returns:
        Layers by name, in module order.

    Raises:
        LayerNotFound: If nothing matches (the message lists what there is), a name or glob means
            nothing but modules that are not supported (it says why), or a chosen layer shares its
            weight with another module.
    """
    available = linear_layers(model)
    chosen = {name: layer for name, layer in available.items() if matches(spec, layer)}
    refused = refused_modules(model)
    _refuse_unsupported(spec, available, refused)
    if not chosen:
        listing = "\n  ".join(available) or "(none)"
        others = "\n  ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise LayerNotFound(
            f"layers={spec!r} matches no linear layer of this {type(model).__name__}; pass "
            f"{', '.join(map(repr, KINDS))}, a glob such as '*.mlp.*', or a predicate. "
            f"Its linear layers are:\n  {listing}\nNot supported are:\n  {others or '(none)'}"
        )
    refuse_tied(model, chosen)
    return chosen


def are_kinds(layers: LayerSpec) -> bool:
    """Return whether layers are chosen by kind alone, none of them by name."""
    parts = (
        [layers] if isinstance(layers, str) else layers if isinstance(layers, list | tuple) else ()
    )
    return bool(parts) and all(part in KINDS for part in parts)


class Shaped(Protocol):
    """What is known of one layer, and of which widths."""

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""


def basis_layers(
    model: nn.Module, basis: Mapping[str, Shaped], layers: LayerSpec | None
) -> dict[str, LinearLayer]:
    """Return the layers of a model that an eigenbasis describes.

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
        shape = basis[name].shape
        if shape != (layer.d_out, layer.d_in):
            raise BasisMismatch(
                f"the basis of layer {name!r} is for a weight {shape}, the model's is "
                f"{(layer.d_out, layer.d_in)}: it was measured on another model"
            )
    return chosen


def matches(spec: LayerSpec, layer: LinearLayer) -> bool:
    """Return whether ``layer`` matches ``spec``."""
    if callable(spec):
        return bool(spec(layer.name, layer.module))
    return matches_name(spec, layer.name, layer.kind)


def matches_name(spec: str | Iterable[str], name: str, of_kind: str | None = None) -> bool:
    """Return whether a layer of this name, and of this kind or the name's, matches ``spec``."""
    if isinstance(spec, str):
        found = kind(name) if of_kind is None else of_kind
        if spec == "all":
            return found not in LEFT_OUT
        return found == spec if spec in KINDS else fnmatchcase(name, spec)
    return any(matches_name(pattern, name, of_kind) for pattern in spec)


def kind(name: str) -> str:
    """Return ``"attention"``, ``"mlp"``, ``"head"`` or ``"other"`` from a layer's name.

    Attention is looked for first: ``attention.output.dense`` of BERT belongs to it,
    ``output.dense`` to the MLP. Heads stand at the top of the model, so only the first component
    identifies them.
    """
    parts = name.lower().split(".")
    if parts[0] in _HEADS or parts[-1] in ("lm_head", "embed_out"):
        return "head"
    if any(word in part for part in parts for word in _ATTENTION):
        return "attention"
    if any(word in part for part in parts for word in _MLP[:5]) or any(p in _MLP for p in parts):
        return "mlp"
    return "other"


def _kind(name: str, full_name: str, modules: Mapping[str, nn.Module]) -> str:
    """Return the kind of a layer from its name and from the siblings of each module on its path."""
    parts = full_name.split(".")
    for depth, part in enumerate(parts):
        siblings = modules[".".join(parts[:depth])]._modules
        if "base_layer" in siblings and part != "base_layer":
            return "adapter"
        if "experts" in siblings and _ROUTER.fullmatch(part):
            return "router"
    return kind(name)


def _refuse_unsupported(
    spec: LayerSpec, available: Mapping[str, LinearLayer], refused: Mapping[str, str]
) -> None:
    if callable(spec):
        return
    for pattern in [spec] if isinstance(spec, str) else spec:
        if pattern in KINDS or any(fnmatchcase(name, pattern) for name in available):
            continue
        meant = [f"{n!r}: {reason}" for n, reason in refused.items() if fnmatchcase(n, pattern)]
        if meant:
            raise LayerNotFound(
                f"layers= has {pattern!r}, which means no supported layer:\n  " + "\n  ".join(meant)
            )


def refuse_tied(model: nn.Module, chosen: Mapping[str, LinearLayer]) -> None:
    """Raise if a chosen layer's weight is another module's too.

    Raises:
        LayerNotFound: If it is.
    """
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    bare = bare_names(model)
    for full_name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((bare[full_name], module))
    for name, layer in chosen.items():
        others = sorted(
            {owner for owner, module in owners[id(layer.parameter)] if module is not layer.module}
        )
        if others:
            raise LayerNotFound(
                f"layer {name!r} shares its weight with {', '.join(map(repr, others))}, so neither "
                "its factors nor an edit would be its own; leave it out of layers="
            )
