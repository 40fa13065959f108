"""Coverage: which parameters have factors, and the errors that say why others have none."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from curvfast.collection.hooks import Calls
from curvfast.errors import CoverageError, InputError, NumericalWarning
from curvfast.kfac.layer_factors import LayerFactors
from curvfast.model.families import ExpertLayer, LinearLayer, unsupported_reason
from curvfast.model.layers import LEFT_OUT, bare_name, linear_layers

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


class Counted(Protocol):
    """Sums that count their rows."""

    def rows(self, name: str) -> tuple[int, int]:
        """Return how many inputs and how many gradients of a layer were summed."""


def require_rows(
    layers: Iterable[str], sums: Counted, calls: Mapping[str, Calls], skipped: Mapping[str, int]
) -> None:
    """Check that A and G of every layer hold rows, and the same ones.

    Args:
        layers: The chosen layers.
        sums: What was summed.
        calls: How often each layer was seen.
        skipped: How many gradients of each layer overflowed.

    Raises:
        CoverageError: If a layer has none, or unequal ones.
    """
    problems = []
    for name in layers:
        rows_a, rows_g = sums.rows(name)
        if not (rows_a and rows_g):
            problems.append(f"{name!r}: {_why_empty(calls[name], skipped[name])}")
        elif rows_a != rows_g:
            problems.append(
                f"{name!r}: {rows_a} inputs but {rows_g} gradients: it read the tensor of another "
                "layer and got no gradient for it; collect with share_inputs=False"
            )
    if problems:
        raise CoverageError(
            "some chosen layers have no factors (nothing is lost: what was summed is still here; "
            "leave them out by layers=, or remove the cause):\n  " + "\n  ".join(problems)
        )


def require_cuda(model: nn.Module) -> None:
    """Raise unless the whole model is on CUDA devices, the only ones with streams.

    Raises:
        InputError: If a parameter is elsewhere.
    """
    elsewhere = {p.device.type for p in model.parameters()} - {"cuda"}
    if elsewhere:
        raise InputError(
            f"streams='overlap' needs the model on a CUDA device; some of it is on "
            f"{', '.join(sorted(elsewhere))}. Leave streams= out"
        )


def unrouted(
    layers: Mapping[str, LinearLayer],
    sums: Counted,
    calls: Mapping[str, Calls],
    skipped: Mapping[str, int],
) -> list[str]:
    """Return the experts whose module ran, and to which no token that counts was routed.

    Args:
        layers: The chosen layers.
        sums: What was summed.
        calls: How often each layer was seen.
        skipped: How many gradients of each layer overflowed.
    """
    return [
        name
        for name, layer in layers.items()
        if isinstance(layer, ExpertLayer)
        and (calls[name].resting or calls[name].gradients)
        and not any(sums.rows(name))
        and not skipped[name]
    ]


def warn_unrouted(names: list[str]) -> None:
    """Warn of experts that are left out because no counted token was routed to them."""
    if names:
        warnings.warn(
            f"{len(names)} expert layer(s) are left out: no counted token was routed to them, so "
            f"they have no factors; collect more data. {', '.join(names[:8])}",
            NumericalWarning,
            stacklevel=4,
        )


def warn_few_rows(layers: Mapping[str, LayerFactors]) -> None:
    """Warn of layers that saw fewer rows than they are wide: their factors lack rank."""
    few = [n for n, f in layers.items() if f.rows_g < max(len(f.a_sum), len(f.g_sum))]
    if few:
        rows = min(layers[name].rows_g for name in few)
        warnings.warn(
            f"{len(few)} layer(s) saw fewer rows than they are wide ({rows} at least), so their "
            f"factors are rank-deficient; collect more data. {', '.join(few[:8])}",
            NumericalWarning,
            stacklevel=4,
        )


def _why_empty(calls: Calls, skipped: int) -> str:
    if calls.resting and not calls.forward:
        return "no token was routed to it"
    if not calls.forward:
        return (
            "its hook never fired. The model never called it, or was compiled before collect() "
            "began: torch.compile ignores later hooks, so enter collect() first"
        )
    if skipped:
        return f"all {skipped} gradients overflowed and were left out"
    if calls.gradients:
        return "gradients came, but no row of them counts: is every position masked?"
    if calls.forward == calls.without_grad:
        return (
            "its output never required a gradient: it ran under no_grad, or everything up to it is "
            "frozen; use collect_from(), which needs no trainable parameter, or let the inputs "
            "require a gradient (model.enable_input_require_grads())"
        )
    return "no gradient reached it: was backward() called inside the with block?"
