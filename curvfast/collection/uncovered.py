"""Uncovered: errors and warnings that say why a chosen layer has no factors."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from torch import nn

from curvfast.collection.hooks import Calls
from curvfast.errors import CoverageError, InputError, NumericalWarning
from curvfast.kfac.layer_factors import LayerFactors
from curvfast.model.families import ExpertLayer, LinearLayer

# Of experts that are modules by themselves, any may get no token.
_IN_A_LIST = re.compile(r"experts?\.\d+\.|experts?\.\d+$")
_SHOWN = 8


class Counted(Protocol):
    """Sums that count their rows."""

    def rows(self, name: str) -> tuple[int, int]:
        """Return how many inputs and how many gradients of a layer were summed."""


def require_rows(
    layers: Iterable[str],
    sums: Counted,
    calls: Mapping[str, Calls],
    skipped: Mapping[str, int],
    *,
    by_kind: bool = False,
) -> list[str]:
    """Check that A and G of every layer hold rows, and the same ones.

    Args:
        layers: The chosen layers.
        sums: What was summed.
        calls: How often each layer was seen.
        skipped: How many gradients of each layer were not finite.
        by_kind: Whether the layers were chosen by their kind: those that the model never called
            are then left out, with a warning, if there are others.

    Returns:
        The layers left out.

    Raises:
        CoverageError: If a layer has none, or unequal ones.
    """
    layers = list(layers)
    idle = [*uncalled(layers, calls), *unreached(layers, calls)] if by_kind else []
    if len(idle) == len(layers):
        idle = []
    problems = []
    for name in layers:
        if name in idle:
            continue
        rows_a, rows_g = sums.rows(name)
        if not (rows_a and rows_g):
            problems.append(f"{name!r}: {_why_empty(calls[name], skipped[name])}")
        elif calls[name].unread:
            problems.append(f"{name!r}: {calls[name].why_unseen()}")
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
    warn_uncalled(idle, calls)
    return idle


def never_called(layers: Mapping[str, LinearLayer], calls: Mapping[str, Calls]) -> list[str]:
    """Return the layers that a model did not call; experts may get no token, and are not told.

    Args:
        layers: The chosen layers.
        calls: How often each layer was seen.
    """
    return [
        name
        for name, layer in layers.items()
        if not (calls[name].forward or calls[name].resting)
        and not isinstance(layer, ExpertLayer)
        and not _IN_A_LIST.search(name)
    ]


def require_called(uncalled: Sequence[str], *, by_kind: bool) -> None:
    """Tell of layers that the first batch never called: a warning where they can be left out.

    Args:
        uncalled: The layers.
        by_kind: Whether layers were chosen by kind, so that some may be left out.

    Raises:
        CoverageError: Unless they may.
    """
    what = (
        f"the first batch never called {len(uncalled)} chosen layer(s): {_listing(uncalled)}. "
        "Their weight is read by other code, they serve other inputs (images, say), or the model "
        "was compiled before this began"
    )
    if not by_kind:
        raise CoverageError(f"{what}; leave them out by layers=")
    warnings.warn(
        f"{what}; they are left out, and the others are measured", NumericalWarning, stacklevel=2
    )


def tell_uncalled(uncalled: Sequence[str]) -> None:
    """Warn, early, of layers that the first batch never called, if there are some."""
    if not uncalled:
        return
    warnings.warn(
        f"the first batch never called {len(uncalled)} chosen layer(s): {_listing(uncalled)}. If "
        "no later one does, factors() leaves them out where layers= names a kind, and refuses "
        "where it names them",
        NumericalWarning,
        stacklevel=2,
    )


def _listing(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_SHOWN])) + (", …" if len(names) > _SHOWN else "")


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
        skipped: How many gradients of each layer were not finite.
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


def uncalled(layers: Iterable[str], calls: Mapping[str, Calls]) -> list[str]:
    """Return the layers whose module the model never called, outside of torch.func at least.

    Args:
        layers: The chosen layers.
        calls: How often each layer was seen.
    """
    return [name for name in layers if not (calls[name].forward or calls[name].resting)]


def unreached(layers: Iterable[str], calls: Mapping[str, Calls]) -> list[str]:
    """Return the layers that were called, and whose output no loss depends on.

    Args:
        layers: The chosen layers.
        calls: How often each layer was seen.
    """
    return [
        name
        for name in layers
        if calls[name].forward > calls[name].without_grad
        and not (calls[name].gradients or calls[name].unread)
    ]


def warn_uncalled(names: list[str], calls: Mapping[str, Calls]) -> None:
    """Warn of layers that are left out because the model never called them."""
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        warnings.warn(
            f"{len(names)} layer(s) chosen by their kind are left out, the others are measured: "
            f"{', '.join(map(repr, names[:_SHOWN]))}{more}. {_why_empty(calls[names[0]], 0)}",
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
    unseen = calls.why_unseen()
    if unseen:
        return unseen
    if not calls.forward:
        return (
            "its hook never fired. The model never called it; or reads its weight without calling "
            "the module (torch.nn.functional.linear(x, module.weight), a fused function), which "
            "no hook sees; or was compiled before collect() began: torch.compile ignores later "
            "hooks, so enter collect() first"
        )
    if skipped:
        return f"all {skipped} gradients were not finite, or overflowed, and were left out"
    if calls.gradients:
        return "gradients came, but no row of them counts: is every position masked?"
    if calls.forward == calls.without_grad:
        return (
            "its output never required a gradient: it ran under no_grad, or everything up to it is "
            "frozen; use collect_from(), which needs no trainable parameter, or let the inputs "
            "require a gradient (model.enable_input_require_grads())"
        )
    return "no gradient reached it: was backward() called inside the with block?"
