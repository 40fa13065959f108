"""Coverage: which parameters of a model the factors describe, and why the others are not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from curvfast.layers import LinearLayer, bare_name, kind, linear_layers


@dataclass(frozen=True)
class Coverage:
    """What was measured and what was not."""

    covered: dict[str, int]
    """Weights with factors: parameter name -> rows counted so far."""
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
    model: nn.Module, chosen: dict[str, LinearLayer], rows: dict[str, int], sum_bytes: int
) -> Coverage:
    """Return the coverage of ``chosen`` layers, ``rows`` of which were counted."""
    supported = linear_layers(model)
    by_parameter = {id(layer.parameter): name for name, layer in chosen.items()}
    covered, uncovered = {}, {}
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
            if id(parameter) in by_parameter:
                covered[name] = rows.get(by_parameter[id(parameter)], 0)
                inside += parameter.numel()
            else:
                uncovered[name] = _reason(owner, leaf, module, owner in supported)
    return Coverage(covered, uncovered, inside / max(1, total), sum_bytes)


def _reason(owner: str, leaf: str, module: nn.Module, supported: bool) -> str:
    if supported and leaf != "bias":
        if kind(owner) == "head":
            return "output head: left out unless named in layers="
        return "not chosen by layers="
    if leaf == "bias":
        return "bias: edits leave it untouched"
    if isinstance(module, nn.Embedding):
        return "embedding: no Kronecker factors"
    if "norm" in type(module).__name__.lower():
        return "normalisation: not a linear map"
    return f"{type(module).__name__} is not supported"
