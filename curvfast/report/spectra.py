"""Figure of the study ``spectra``: eigenvalues against rank, and mass curves, over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from curvfast.report.style import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {"demo_lm": "demo's LM", "lab_lm": "lab's LM", "lab_vit": "lab's ViT"}


def spectra(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the spectra of each model's layers with their power laws, and its mass curves.

    Args:
        runs: For each seed, layers by name by model: ``G`` and ``A`` with ``ranks``, ``values``
            and ``law``, and ``fractions`` and ``mass`` of the pairs.

    Returns:
        A row a model: G, A (the first seed's layers, over the largest eigenvalue), and mass curves
        of every seed with their median.
    """
    from matplotlib.figure import Figure

    names = list(runs[0])
    figure = Figure(figsize=(11.5, 3.3 * len(names)), layout="constrained", dpi=140)
    for row, name in zip(figure.subplots(len(names), 3, squeeze=False), names, strict=True):
        for axes, side in zip(row, "GA", strict=False):
            _factor(axes, runs[0][name], side)
            axes.set_title(f"{TITLES[name]}: {_law(runs, name, side)}", **_LEFT)
        _curves(row[2], [run[name] for run in runs])
        row[2].set_title(f"{TITLES[name]}: mass held by the largest pairs", **_LEFT)
    return figure


# Smaller eigenvalues are rounding error of float32 sums.
_LOWEST = 1e-7
_LEFT: dict[str, Any] = {"loc": "left", "fontsize": 9.5}


def _factor(axes: Axes, layers: Mapping[str, Any], side: str) -> None:
    from matplotlib import colormaps

    for number, layer in enumerate(layers.values()):
        own = layer[side]
        top = own["values"][0]
        colour = colormaps["viridis"](0.9 * number / max(1, len(layers) - 1))
        axes.plot(own["ranks"], [v / top for v in own["values"]], color=colour, linewidth=1)
        law = own["law"]
        if law:
            ends = law["first"], law["last"]
            line = [law["scale"] * rank ** -law["exponent"] / top for rank in ends]
            axes.plot(ends, line, color="#c8553d", linewidth=1, linestyle="--", alpha=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    least = min(own[side]["values"][-1] / own[side]["values"][0] for own in layers.values())
    axes.set_ylim(max(_LOWEST, least / 2), 2)
    axes.set_xlabel("rank k (first layers dark; dashed: fits)")
    axes.set_ylabel(f"eigenvalue k of {side} / the largest")
    plain(axes)


def _law(runs: Sequence[Mapping[str, Any]], name: str, side: str) -> str:
    laws = [layer[side]["law"] for run in runs for layer in run[name].values()]
    exponents = [law["exponent"] for law in laws if law]
    if not exponents:
        return f"{side}, no power law"
    ends = f"{min(exponents):.1f} to {max(exponents):.1f}"
    return f"{side}, α = {median(exponents):.1f} ({ends})"


def _curves(axes: Axes, runs: Sequence[Mapping[str, Any]]) -> None:
    layers = [layer for run in runs for layer in run.values()]
    share = [100 * fraction for fraction in layers[0]["fractions"]]
    for layer in layers:
        axes.plot(
            share, [100 * m for m in layer["mass"]], color="#8d99ae", linewidth=0.6, alpha=0.6
        )
    middle = [100 * median(masses) for masses in zip(*(x["mass"] for x in layers), strict=True)]
    axes.plot(share, middle, color="#0b6e4f", linewidth=2, marker=".", label="median of layers")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("largest pairs, % of all")
    axes.set_ylabel("curvature mass, %")
    axes.set_ylim(0, 102)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    plain(axes)
