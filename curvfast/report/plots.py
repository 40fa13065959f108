"""Figures of the demo and of spectrum logs; each function returns a figure without showing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from curvfast.kfac.spectrum_log import LayerRecord, SpectrumRecord

_STYLE = {
    "kfac": ("K-FAC (curvfast)", "#0b6e4f", "o"),
    "svd": ("truncated SVD", "#c8553d", "s"),
    "random": ("random pairs", "#8d99ae", "^"),
}


def frontier(
    base: Mapping[str, float], sweep: Sequence[Mapping[str, Any]], *, chosen: float, title: str
) -> Figure:
    """Draw memorization against perplexity over ρ, a curve a method.

    Args:
        base: ``strict`` and ``perplexity`` of the unedited model.
        sweep: Points with ``mass`` and, for each method, ``strict`` and ``perplexity``.
        chosen: The mass to mark.
        title: Heading.

    Returns:
        The figure; the axis of perplexity ends at six times the unedited model's.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained", dpi=160)
    axes = figure.subplots()
    limit = 6 * base["perplexity"]
    widest = base["perplexity"]
    for method, (label, colour, marker) in _STYLE.items():
        points = [p for p in sweep if method in p and p[method]["perplexity"] <= limit]
        if not points:
            continue
        x = [p[method]["perplexity"] for p in points]
        y = [100 * p[method]["strict"] for p in points]
        widest = max(widest, *x)
        axes.plot(x, y, color=colour, marker=marker, label=label, linewidth=1.8, markersize=5)
        for point, px, py in zip(points, x, y, strict=True):
            if method == "kfac" and point["mass"] == chosen:
                axes.annotate(
                    f"ρ = {chosen:g}", (px, py), xytext=(2, 8), textcoords="offset points",
                    color=colour, fontweight="bold", horizontalalignment="left",
                )  # fmt: skip
    axes.plot(
        base["perplexity"], 100 * base["strict"], marker="*", markersize=14, color="#1b1b1e",
        linestyle="none", label="unedited model",
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(_ticks(base["perplexity"], widest), minor=False)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("perplexity on held-out text (log scale; left is better)")
    axes.set_ylabel("passages recited verbatim, % (low is better)")
    axes.set_ylim(-4, 104)
    axes.set_title(title, loc="left", fontsize=10.5)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def spectra_over_training(records: Sequence[SpectrumRecord], *, title: str) -> Figure:
    """Draw how the curvature of each layer changes over a training.

    Args:
        records: At least one, by step, from :func:`curvfast.kfac.spectrum_log.read_log`.
        title: Heading.

    Returns:
        Three panels, a thin line a layer, the first layers dark, and the median in black: the
        effective rank as a share of all eigenpairs; the share of the curvature mass in the flattest
        half of them; and the mass curves (medians over layers) from the first to the last record.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 3.8), layout="constrained", dpi=160)
    ranks, halves, curves = figure.subplots(1, 3)
    _by_step(ranks, records, lambda layer: layer.effective_rank / (layer.d_out * layer.d_in))
    ranks.set_ylabel("effective rank, % of eigenpairs")
    ranks.set_ylim(bottom=0)
    _by_step(halves, records, lambda layer: layer.flattest_half)
    halves.set_ylabel("curvature mass in the flattest half, %")
    if any(layer.flattest_half for record in records for layer in record.layers.values()):
        halves.set_yscale("log", nonpositive="mask")
    count = min(len(records), _CURVES)
    chosen = [round(i * (len(records) - 1) / max(1, count - 1)) for i in range(count)]
    for number, record in enumerate(records[i] for i in chosen):
        points = sorted(
            (100 * f, 100 * median(layer.mass[i] for layer in record.layers.values()))
            for i, f in enumerate(record.fractions)
            if f > 0
        )
        colour = colormaps["viridis"](0.9 * number / max(1, count - 1))
        curves.plot(
            *zip(*points, strict=True), color=colour, marker=".", label=f"step {record.step}"
        )
    curves.set_xscale("log")
    curves.xaxis.set_major_formatter("{x:g}")
    curves.set_xlabel("largest eigenpairs, % of all (log scale)")
    curves.set_ylabel("curvature mass they hold, %")
    curves.set_ylim(0, 102)
    curves.legend(frameon=False)
    for axes in (ranks, halves, curves):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, horizontalalignment="left", fontsize=10.5)
    return figure


# More mass curves than these cannot be distinguished.
_CURVES = 6


def _by_step(
    axes: Axes, records: Sequence[SpectrumRecord], measure: Callable[[LayerRecord], float]
) -> None:
    """Draw one number of every layer, in percent, and their median."""
    from matplotlib import colormaps

    names = list(dict.fromkeys(name for record in records for name in record.layers))
    for number, name in enumerate(names):
        held = [(r.step, 100 * measure(r.layers[name])) for r in records if name in r.layers]
        colour = colormaps["viridis"](0.9 * number / max(1, len(names) - 1))
        axes.plot(*zip(*held, strict=True), color=colour, linewidth=0.8, alpha=0.6, marker=".")
    middle = [100 * median(measure(layer) for layer in r.layers.values()) for r in records]
    axes.plot([r.step for r in records], middle, color="#1b1b1e", linewidth=2, label="median")
    axes.set_xlabel("optimizer step")
    axes.legend(frameon=False)


def _ticks(low: float, high: float) -> list[float]:
    candidates = (10, 20, 30, 40, 50, 60, 80, 100, 150, 200, 300, 400, 600, 800, 1200)
    return [tick for tick in candidates if 0.9 * low <= tick <= 1.05 * high]
