"""Coverage: which parameters of a model have factors, and why the others have none."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from curvfast.adapters import LinearLayer, unsupported_reason
from curvfast.layers import LEFT_OUT, bare_name, linear_layers

_NOT_CHOSEN = "not chosen by layers="


@dataclass(frozen=True)
class Coverage:
    """Coverage report: the parameters that have factors, and the reasons of those without."""

    covered: dict[str, int]
    """Weights with factors: parameter name, or layer name of an expert -> rows counted so far."""
    uncovered: dict[str, str]
    """Every other parameter: name -> reason."""
    fraction: float
    """Share of the model's parameters that is covered."""
    sum_bytes: int
    """Upper bound of the bytes of all sums, float32 (layers that share an A need less)."""

    def to_dict(self) -> dict[str, Any]:
        """Return the coverage as JSON-able values."""
        return {
            "covered": self.covered,
            "uncovered": self.uncovered,
            "fraction": self.fraction,
            "sum_bytes": self.sum_bytes,
        }

    def __str__(self) -> str:
        """Return a short account: the share, then the reasons with their counts."""
        reasons: dict[str, int] = {}
        for reason in self.uncovered.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        lines = [f"{len(self.covered)} weights covered, {self.fraction:.1%} of all parameters"]
        lines += [f"  {count:>5} not covered: {reason}" for reason, count in reasons.items()]
        return "\n".join(lines)


def describe(
    model: nn.Module,
    chosen: Mapping[str, LinearLayer],
    rows: Mapping[str, int],
    unrouted: Collection[str],
    sum_bytes: int,
) -> Coverage:
    """Return the coverage of ``chosen`` layers.

    A stacked parameter of experts counts as one, by its own name, if no expert of it was chosen,
    and otherwise expert by expert, by the names of the layers.

    Args:
        model: The model.
        chosen: Layers by name.
        rows: How many rows of each were counted.
        unrouted: Those that no counted token was routed to.
        sum_bytes: An upper bound for all sums.
    """
    supported: dict[int, list[LinearLayer]] = {}
    for layer in linear_layers(model).values():
        supported.setdefault(id(layer.parameter), []).append(layer)
    covered: dict[str, int] = {}
    uncovered: dict[str, str] = {}
    seen: set[int] = set()
    inside = total = 0
    for full_name, module in model.named_modules():
        owner = bare_name(full_name)
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{owner}.{leaf}" if owner else leaf
            # A tied parameter is named once, where it stands first, as torch does.
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            total += parameter.numel()
            layers = [x for x in supported.get(id(parameter), []) if x.module is module]
            if not any(layer.name in chosen for layer in layers):
                uncovered[name] = _reason(leaf, module, layers)
                continue
            for layer in layers:
                own = name if len(layers) == 1 else layer.name
                if layer.name not in chosen:
                    uncovered[own] = _NOT_CHOSEN
                elif layer.name in unrouted:
                    uncovered[own] = "no counted token was routed to this expert"
                else:
                    covered[own] = rows.get(layer.name, 0)
                    inside += parameter.numel() // len(layers)
    return Coverage(covered, uncovered, inside / max(1, total), sum_bytes)


def _reason(leaf: str, module: nn.Module, layers: list[LinearLayer]) -> str:
    if layers:
        left_out = LEFT_OUT.get(layers[0].kind)
        return f"{left_out}: left out unless named in layers=" if left_out else _NOT_CHOSEN
    if leaf.endswith("bias"):
        return "bias: edits leave it untouched"
    return unsupported_reason(module)
