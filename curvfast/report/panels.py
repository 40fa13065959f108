"""Small figures of a page: a layer's spectrum and staircase, and the mass curves of all layers."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING

from curvfast.kfac.spectrum import FRACTIONS
from curvfast.report.curvature import LayerCurvature, Stairs
from curvfast.report.style import METHOD_STYLES, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_A, _G = METHOD_STYLES["svd"][1], METHOD_STYLES["kfac"][1]
_DECADES = 8


def spectrum_panel(layer: LayerCurvature) -> Figure:
    """Draw the eigenvalues of A and of G over their number, both as shares of the largest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.1, 1.75), layout="constrained")
    axes = figure.subplots()
    sides = (("A", _A, layer.values_a, (-4, -12)), ("G", _G, layer.values_g, (3, 3)))
    for label, colour, points, away in sides:
        largest = points[0][1] or 1.0
        seen = [(n, v / largest) for n, v in points if v > 10.0**-_DECADES * largest]
        if seen:
            axes.plot(*zip(*seen, strict=True), color=colour, linewidth=1.6)
            axes.annotate(
                label, seen[len(seen) // 2], xytext=away, textcoords="offset points",
                color=colour, fontsize=10, fontweight="bold",
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(10.0**-_DECADES, 3)
    axes.set_yticks([1e-8, 1e-6, 1e-4, 1e-2, 1], ["1e-8", "1e-6", "1e-4", ".01", "1"])
    axes.set_xlim(left=0.9)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.tick_params(labelsize=8.5)
    axes.minorticks_off()
    plain(axes)
    return figure


def staircase_panel(stairs: Stairs) -> Figure:
    """Draw a staircase among all pairs, the largest at the upper left."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.1, 2.05), layout="constrained")
    axes = figure.subplots()
    rows = [row for row, _ in stairs.corners] + [stairs.rows]
    widths = [width for _, width in stairs.corners]
    axes.stairs(widths, rows, orientation="horizontal", fill=True, color=_G, alpha=0.3, linewidth=0)
    axes.stairs(widths, rows, orientation="horizontal", color=_G, linewidth=1.3, baseline=None)
    axes.set_xlim(0, stairs.columns)
    axes.set_ylim(stairs.rows, 0)
    axes.set_xticks([0, stairs.columns])
    axes.set_yticks([0, stairs.rows])
    axes.set_xlabel("eigenvectors of A", fontsize=8.5, labelpad=-6)
    axes.set_ylabel("eigenvectors of G", fontsize=8.5, labelpad=-8)
    axes.tick_params(labelsize=8.5)
    return figure


def mass_curves(layers: Mapping[str, LayerCurvature]) -> Figure:
    """Draw the share of the curvature mass in the largest pairs, a line a layer, and the median."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.3, 3.5), layout="constrained")
    axes = figure.subplots()
    shares = [100 * f for f in FRACTIONS]
    curves = [[100 * m for m in layer.spectrum.mass] for layer in layers.values()]
    for number, curve in enumerate(curves):
        colour = colormaps["viridis"](0.1 + 0.75 * number / max(1, len(curves) - 1))
        axes.plot(shares, curve, color=colour, linewidth=0.9, alpha=0.7)
    middle = [median(column) for column in zip(*curves, strict=True)]
    axes.plot(
        shares, middle, color=METHOD_STYLES["base"][1], linewidth=2.2, label="median of layers"
    )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlabel("largest eigenpairs, % of all (log scale)")
    axes.set_ylabel("curvature mass they hold, %")
    axes.set_ylim(0, 102)
    axes.legend(frameon=False, loc="lower right")
    plain(axes)
    return figure
