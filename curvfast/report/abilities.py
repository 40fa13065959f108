"""What an edit takes of each ability, over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from curvfast.report.style import METHODS, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def abilities(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw accuracy after an edit over accuracy before, by kind of task.

    Args:
        runs: For each seed, figures as of :func:`curvfast.lab.lm.run` by model.

    Returns:
        A panel for each model and way to answer: bars are means, dots are seeds.
    """
    from matplotlib.figure import Figure

    panels = [(model, how) for model, run in runs[0].items() for how in run["kept"]["kfac"]]
    figure = Figure(figsize=(4.8 * len(panels), 4), layout="constrained", dpi=160)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for place, (model, how) in zip(axes, panels, strict=True):
        own = [run[model] for run in runs]
        _bars(place, own, how)
        place.set_title(f"{model}: answers {how}, ρ = {own[0]['mass']:g}", loc="left", fontsize=10)
        place.legend(frameon=False, fontsize=8)
        plain(place)
    axes[0].set_ylabel("accuracy after / before, %")
    return figure


def _bars(axes: Axes, runs: Sequence[Mapping[str, Any]], how: str) -> None:
    kinds = list(runs[0]["kept"]["kfac"][how])
    for offset, method in enumerate(("kfac", "svd")):
        label, colour, _ = METHODS[method]
        shares = [[100 * run["kept"][method][how][kind] for run in runs] for kind in kinds]
        places = [i + 0.4 * offset for i in range(len(kinds))]
        axes.bar(places, [*map(mean, shares)], 0.38, color=colour, alpha=0.55, label=label)
        for place, own in zip(places, shares, strict=True):
            axes.plot([place] * len(own), own, ".", color=colour)
    axes.set_xticks([i + 0.2 for i in range(len(kinds))])
    axes.set_xticklabels([kind.replace("_", "\n") for kind in kinds], fontsize=8)
    axes.axhline(100, color="#1b1b1e", linewidth=0.8, linestyle=":")
