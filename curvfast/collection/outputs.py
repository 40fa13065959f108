"""Outputs: which tensors of what a model returned can be logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

# Of a model's output, what is no prediction.
_INNER = ("past_key_values", "hidden_states", "attentions", "last_hidden_state", "embeds")


def watchable(output: Any) -> dict[str, Tensor]:
    """Return the tensors of a model's output that can be logits, by name.

    Those named logits where there are any; else the floating, differentiable tensors of at least
    two dimensions at the shallowest level that has one; no hidden states, attentions or caches.
    """
    level: list[tuple[str, Any]] = [("output", output)]
    for _ in range(4):
        # Once each: a tensor may have two names.
        once = {id(value): (name, value) for name, value in reversed(level)}.values()
        found = {name: value for name, value in reversed(once) if _can_be_logits(value)}
        named = {n: t for n, t in found.items() if n.rpartition(".")[2].endswith("logits")}
        if found:
            rest = named or found
            return dict(sorted(rest.items(), key=lambda item: not _is_logits(item[0])))
        level = [part for name, value in level for part in _parts(name, value)]
    return {}


def _is_logits(name: str) -> bool:
    return name.rpartition(".")[2] == "logits"


def _parts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        parts: list[tuple[str, Any]] = [(f"{name}.{key}", part) for key, part in value.items()]
    elif is_dataclass(value) and not isinstance(value, type):
        parts = [(f"{name}.{f.name}", getattr(value, f.name, None)) for f in fields(value)]
    elif isinstance(value, list | tuple):
        names = getattr(value, "_fields", range(len(value)))
        parts = [
            (f"{name}.{n}" if isinstance(n, str) else f"{name}[{n}]", part)
            for n, part in zip(names, value, strict=True)
        ]
    else:
        parts = []
    for full, part in parts:
        if not any(inner in full.rpartition(".")[2] for inner in _INNER):
            yield full, part


def _can_be_logits(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.requires_grad
        and not value.is_nested
        and value.layout == torch.strided
        and not hasattr(value, "device_mesh")
        and value.device.type != "meta"
        and value.is_floating_point()
        and value.dim() >= 2
        and value.numel() > 0
        and any(size > 1 for size in (value.shape[1], value.shape[-1]))
    )


def differentiable(output: Any) -> list[Tensor]:
    """Return the tensors at the first level of a model's output that require a gradient."""
    values = output.values() if isinstance(output, Mapping) else output
    if not isinstance(output, Mapping | list | tuple):
        values = [output]
    return [value for value in values if isinstance(value, Tensor) and value.requires_grad]
