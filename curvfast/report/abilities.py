"""What an edit takes of each ability, over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from curvfast.report.style import METHODS, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def abilities(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw accuracy after an edit over accuracy before, by kind of task.

    Args:
        runs: As of :func:`curvfast.lab.lm.run`, one a seed.

    Returns:
        Two panels, answers generated and answers chosen: bars are means, dots are seeds.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained", dpi=160)
    for axes, how in zip(figure.subplots(1, 2, sharey=True), ("generated", "chosen"), strict=True):
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
        axes.set_title(f"answers {how}, ρ = {runs[0]['mass']:g}", loc="left", fontsize=10)
        axes.legend(frameon=False, fontsize=8)
        plain(axes)
    figure.axes[0].set_ylabel("accuracy after / before, %")
    return figure
