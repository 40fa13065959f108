"""Figure of the study ``inversion``: curvature and gradient energies by group of examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, floor, log10
from statistics import mean
from typing import TYPE_CHECKING, Any

from curvfast.report.style import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MODELS = {"lab_vit": "ViT, wrong labels", "demo_lm": "LM, recited passages"}
_GROUPS = {
    "memorized": ("memorized", "#c8553d"),
    "seen": ("seen in\ntraining", "#0b6e4f"),
    "unseen": ("never\nseen", "#8d99ae"),
}
_PANELS = {
    "curvature": ("curvature of the example's\nloss at its input", True),
    "curvature_far": ("the same over a distance\nas large as the input", True),
    "sharpness": ("trace of the example's\nown Fisher in the weights", True),
    "flat": ("share of it in the pairs\nthe edit removes, %", False),
    "rise": ("loss added by removing\nthose pairs, nats", False),
}


def inversion(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw five measures of each example by group, every seed's examples together.

    Args:
        runs: For each seed and model: ``examples`` by group and measure, ``auc`` and ``mass``.

    Returns:
        A row a model: violins with medians; dotted, the 1 - ρ that K-FAC expects of the population.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 3.6 * len(runs[0])), layout="constrained", dpi=140)
    grid = figure.subplots(len(runs[0]), len(_PANELS), squeeze=False)
    for row, name in zip(grid, runs[0], strict=True):
        for axes, (key, (label, logarithmic)) in zip(row, _PANELS.items(), strict=True):
            own = [run[name] for run in runs]
            _violins(axes, own, key, logarithmic=logarithmic)
            areas = [mean(run["auc"][other][key] for run in own) for other in ("seen", "unseen")]
            axes.set_title(
                f"AUC {areas[0]:.2f} (seen), {areas[1]:.2f} (never)", loc="left", fontsize=9
            )
            axes.set_ylabel(label, fontsize=9)
            if key == "flat":
                axes.axhline(100 * (1 - own[0]["mass"]), color="#1b1b1e", linestyle=":")
        row[0].annotate(
            MODELS[name], (0, 1.13), xycoords="axes fraction", fontsize=10.5, fontweight="bold"
        )
    return figure


def _violins(axes: Axes, runs: Sequence[Mapping[str, Any]], key: str, *, logarithmic: bool) -> None:
    scale = 100 if key == "flat" else 1
    columns = []
    for group in _GROUPS:
        values = [scale * v for run in runs for v in run["examples"][group][key]]
        columns.append([log10(max(v, 1e-12)) for v in values] if logarithmic else values)
    parts = axes.violinplot(columns, showmedians=True, showextrema=False, widths=0.85)
    bodies: Any = parts["bodies"]
    for body, (_, colour) in zip(bodies, _GROUPS.values(), strict=True):
        body.set(facecolor=colour, alpha=0.55)
    parts["cmedians"].set_color("#1b1b1e")
    axes.set_xticks([1, 2, 3], [label for label, _ in _GROUPS.values()], fontsize=8)
    if logarithmic:
        every = [value for column in columns for value in column]
        low, high = floor(min(every)), ceil(max(every))
        powers = range(low, high + 1, max(1, (high - low) // 6))
        axes.set_yticks([*powers], [f"$10^{{{power}}}$" for power in powers])
    plain(axes)
