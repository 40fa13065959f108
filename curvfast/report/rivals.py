"""Figure of Table 1: recitation by each method against its rise of perplexity, over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from curvfast.report.style import METHODS, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Curves beyond this rise of perplexity, in percent, would compress the relevant range.
_WIDEST = 32
_PANELS = {
    "speeches_second_strict": "speeches, the half told to nobody: recited, %",
    "bible_second_strict": "Bible, the half told to nobody: recited, %",
    "ndcg": "nDCG@10 against the unedited model",
}


def rivals(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw recitation and nDCG over the rise of perplexity, for each method.

    Args:
        runs: Figures of the study ``table1``, one a seed.

    Returns:
        Three panels, a thin line a seed: speeches and Bible recited of the half that no method is
        told of, and nDCG@10.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 4.5), layout="constrained", dpi=160)
    for axes, (measure, title) in zip(figure.subplots(1, 3), _PANELS.items(), strict=True):
        scale = 1 if measure == "ndcg" else 100
        for number, run in enumerate(runs):
            base = run["base"]
            for method, points in run["curves"].items():
                label, colour, marker = METHODS[method]
                curve = [base, *points]
                axes.plot(
                    [100 * (p["perplexity"] / base["perplexity"] - 1) for p in curve],
                    [scale * p[measure] for p in curve],
                    color=colour, marker=marker, markersize=4, linewidth=1, alpha=0.75,
                    label=None if number else label,
                )  # fmt: skip
        if scale == 100:
            axes.set_ylim(-4, 104)
        low, high = axes.get_xlim()
        axes.set_xlim(low, min(high, _WIDEST))
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("rise of perplexity on held-out speeches, %")
        plain(axes)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4,
        frameon=False, fontsize=8,
    )  # fmt: skip
    return figure
