"""Figure of the study ``architectures``: memorization against quality over ρ, over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from curvfast.report.style import METHODS, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TITLES = {
    "llama": "Llama, all MLPs",
    "lstm": "LSTM, all gates",
    "vit": "vision transformer, all MLPs",
    "mixer": "MLP-Mixer, all MLPs",
}
_TEXT = ("passages recited, %", "perplexity, after / before (log scale)")
_IMAGES = ("wrong labels kept, %", "validation, after - before, points")
# Axis limits: beyond these an edit has destroyed the model.
_WORST_RATIO, _WORST_POINTS = 3.0, -35.0


def architectures(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw memorization against remaining quality, over ρ.

    Args:
        runs: Results of the study ``architectures``, one a seed.

    Returns:
        A panel an architecture, a thin line a seed: K-FAC, and SVD that keeps as much. In each,
        the lower left is better of text, the upper left of images.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 7.6), layout="constrained", dpi=140)
    for axes, name in zip(figure.subplots(2, 2).flat, runs[0], strict=True):
        for number, run in enumerate(runs):
            _seed(axes, run[name], labelled=number == 0)
        text = runs[0][name]["quality"] == "perplexity"
        across, up = _TEXT if text else _IMAGES
        axes.set_title(
            f"{_TITLES[name]} ({runs[0][name]['parameters'] / 1e6:.1f} million weights)",
            loc="left", fontsize=10,
        )  # fmt: skip
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.set_xlim(-3, 103)
        if text:
            axes.set_yscale("log")
            axes.set_yticks([1, 1.1, 1.25, 1.5, 2, 3], minor=False)
            axes.minorticks_off()
            axes.yaxis.set_major_formatter("×{x:g}")
            axes.set_ylim(0.95, _WORST_RATIO * 1.05)
        else:
            axes.set_ylim(bottom=_WORST_POINTS)
        axes.legend(frameon=False, fontsize=8)
        plain(axes)
    return figure


def _seed(axes: Axes, run: Mapping[str, Any], *, labelled: bool) -> None:
    for method in ("kfac", "svd"):
        label, colour, marker = METHODS[method]
        points = [*(point[method] for point in run["sweep"]), run["base"]]
        axes.plot(
            [100 * point["memorized"] for point in points], [_left(run, p) for p in points],
            color=colour, marker=marker, markersize=3.5, linewidth=1, alpha=0.75,
            label=label if labelled else None,
        )  # fmt: skip
    label, colour, marker = METHODS["base"]
    axes.plot(
        100 * run["base"]["memorized"], _left(run, run["base"]), marker=marker, color=colour,
        markersize=11, linestyle="none", label=label if labelled else None,
    )  # fmt: skip


def _left(run: Mapping[str, Any], point: Mapping[str, float]) -> float:
    """Return the change of quality: a ratio of perplexities, or points of accuracy."""
    if run["quality"] == "perplexity":
        return point["quality"] / float(run["base"]["quality"])
    return 100 * (point["quality"] - float(run["base"]["quality"]))
