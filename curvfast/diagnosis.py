"""Errors and warnings that name chosen layers without factors, or with rank-deficient ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import nn

from curvfast.adapters import ExpertLayer, LinearLayer
from curvfast.capture import Calls
from curvfast.core.factors import LayerFactors
from curvfast.errors import CoverageError, InputError, NumericalWarning


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
            "leave them out by layers=, or mend the cause):\n  " + "\n  ".join(problems)
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
