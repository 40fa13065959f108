"""Figure of the study ``recovery``: abilities while arithmetic is trained again after an edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from curvfast.report.style import METHODS, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = {
    "arithmetic": "arithmetic (taught again), %",
    "memorization": "passages recited, %",
    "closed_book": "facts by heart, %",
    "open_book": "facts told in the prompt, %",
    "logic": "logic, %",
    "perplexity": "perplexity on held-out speeches",
}


def relearning(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw every measure over the training steps on arithmetic.

    Args:
        runs: Figures of the study ``recovery``, one a seed.

    Returns:
        Six panels; a line is a mean over seeds, a dot a seed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 6.4), layout="constrained", dpi=160)
    steps = runs[0]["steps"]
    panels = figure.subplots(2, 3, sharex=True)
    for axes, (kind, title) in zip(panels.flat, _PANELS.items(), strict=True):
        scale = 1 if kind == "perplexity" else 100
        for method in runs[0]["levels"][kind]:
            label, colour, marker = METHODS[method]
            curves = [[scale * v for v in run["levels"][kind][method]] for run in runs]
            for curve in curves:
                axes.plot(steps, curve, marker, color=colour, markersize=3, alpha=0.5)
            middle = [mean(values) for values in zip(*curves, strict=True)]
            axes.plot(steps, middle, color=colour, linewidth=1.8, label=label)
        if scale == 100:
            axes.set_ylim(-4, 104)
        axes.set_xticks(steps)
        axes.set_title(title, loc="left", fontsize=10)
        plain(axes)
    for axes in panels[-1]:
        axes.set_xlabel("steps on lessons of arithmetic")
    panels[0, 0].legend(frameon=False, fontsize=8)
    return figure
