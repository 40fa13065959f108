"""Figures; each function returns one and never shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
                    f"ρ = {chosen:g}", (px, py), xytext=(-9, -4), textcoords="offset points",
                    color=colour, fontweight="bold", horizontalalignment="right",
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


def _ticks(low: float, high: float) -> list[float]:
    candidates = (10, 20, 30, 40, 50, 60, 80, 100, 150, 200, 300, 400, 600, 800, 1200)
    return [tick for tick in candidates if 0.9 * low <= tick <= 1.05 * high]
