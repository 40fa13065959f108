"""Wrong labels learnt by heart, and what an edit leaves of them, over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from curvfast.report.style import METHODS, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def labels(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw wrong labels kept against validation over ρ.

    Args:
        runs: For each seed, results of :func:`curvfast.lab.vit.run` by the name of their recipe.

    Returns:
        A panel a recipe, a thin line a seed: K-FAC and SVD of the same size.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(runs[0]), 4), layout="constrained", dpi=160)
    for axes, name in zip(figure.subplots(1, len(runs[0]), squeeze=False)[0], runs[0], strict=True):
        for number, run in enumerate(runs):
            _seed(axes, run[name], labelled=number == 0)
        recipe = runs[0][name]["recipe"]
        axes.set_title(
            f"{name}: {recipe['noise']:.0%} wrong, {recipe['epochs']} epochs", loc="left",
            fontsize=10,
        )  # fmt: skip
        axes.set_xlabel("wrong labels kept, % (low is better)")
        axes.set_ylabel("validation, %")
        axes.legend(frameon=False, fontsize=8)
        plain(axes)
    return figure


def _seed(axes: Axes, run: Mapping[str, Any], *, labelled: bool) -> None:
    for method in ("kfac", "svd"):
        label, colour, marker = METHODS[method]
        points = [*(p[method] for p in run["sweep"]), run["base"]]
        axes.plot(
            [100 * p["memorized"] for p in points], [100 * p["validation"] for p in points],
            color=colour, marker=marker, markersize=3, linewidth=1, alpha=0.7,
            label=label if labelled else None,
        )  # fmt: skip
    label, colour, marker = METHODS["base"]
    axes.plot(
        100 * run["base"]["memorized"], 100 * run["base"]["validation"], marker=marker,
        color=colour, markersize=11, linestyle="none", label=label if labelled else None,
    )  # fmt: skip
