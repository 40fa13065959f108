"""Figures of the lab experiments; each function returns a figure without showing it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MEASURES = {
    "memorized": ("wrong labels kept", "#c8553d"),
    "ground_truth": ("true class of those", "#0b6e4f"),
    "validation": ("validation", "#1b1b1e"),
    "clean": ("right labels kept", "#8d99ae"),
}


def noise_study(results: Mapping[str, Any]) -> Figure:
    """Draw the effect of edits on a model that memorized wrong labels.

    Args:
        results: Results of :func:`curvfast.experiments.runs.lab_vit.run`.

    Returns:
        Three panels: the four shares over the kept fraction, K-FAC solid and SVD dashed; wrong
        labels kept against validation, a curve for each way to measure curvature; and the same for
        each choice of blocks.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 4.2), layout="constrained", dpi=160)
    over, ways, blocks = figure.subplots(1, 3)
    for key, (label, colour) in _MEASURES.items():
        for method, style in (("kfac", "-"), ("svd", "--")):
            points = [(p[method]["kept_fraction"], p[method][key]) for p in results["sweep"]]
            points.append((1.0, results["base"][key]))
            over.plot(
                *zip(*((100 * x, 100 * y) for x, y in sorted(points)), strict=True), style,
                color=colour, marker=".", label=label if method == "kfac" else None,
            )  # fmt: skip
    over.set_xscale("log")
    over.xaxis.set_major_formatter("{x:g}")
    over.set_xlabel("eigenpairs kept, % (log scale)")
    over.set_ylabel("pictures, %")
    over.set_title("K-FAC solid, SVD of the same size dashed", loc="left", fontsize=9.5)
    over.legend(frameon=False, fontsize=8)
    for arm in results["statistics"]:
        _trade(ways, arm["sweep"], ", ".join(arm["statistics"].values()))
    ways.set_title("curvature measured on", loc="left", fontsize=9.5)
    _trade(blocks, results["sweep"], "as chosen")
    for part in results["blocks"]:
        _trade(blocks, part["sweep"], "blocks " + ", ".join(map(str, part["blocks"])))
    blocks.set_title("blocks edited", loc="left", fontsize=9.5)
    for axes in (ways, blocks):
        base = results["base"]
        axes.plot(
            100 * base["memorized"], 100 * base["validation"], marker="*", markersize=13,
            color="#1b1b1e", linestyle="none", label="unedited",
        )  # fmt: skip
        axes.set_xlabel("wrong labels kept, % (low is better)")
        axes.set_ylabel("validation, %")
        axes.legend(frameon=False, fontsize=7)
    for axes in (over, ways, blocks):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    recipe = results["recipe"]
    figure.suptitle(
        f"{recipe['data']}: {recipe['train_images']} pictures, {recipe['noise']:.0%} wrong labels, "
        f"seed {recipe['seed']}",
        x=0.01, horizontalalignment="left", fontsize=10.5,
    )  # fmt: skip
    return figure


def _trade(axes: Axes, sweep: list[Mapping[str, Any]], label: str) -> None:
    """Draw wrong labels kept against validation over ρ."""
    points = [(100 * p["kfac"]["memorized"], 100 * p["kfac"]["validation"]) for p in sweep]
    axes.plot(*zip(*points, strict=True), marker=".", linewidth=1.4, label=label)


def task_study(results: Mapping[str, Any]) -> Figure:
    """Draw the effect of edits on recitation, arithmetic, facts and logic.

    Args:
        results: Results of :func:`curvfast.experiments.runs.lab_lm.run`.

    Returns:
        Three panels: share kept by kind of task, K-FAC beside SVD of the same size, of answers
        generated and of answers chosen; and each task's generated answers over perplexity.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14.5, 4.2), layout="constrained", dpi=160)
    generated, chosen, tasks = figure.subplots(1, 3)
    for axes, how in ((generated, "generated"), (chosen, "chosen")):
        for offset, (method, label) in enumerate((("kfac", "K-FAC"), ("svd", "truncated SVD"))):
            kept = results["kept"][method][how]
            places = [i + 0.4 * offset for i in range(len(kept))]
            colour = ("#0b6e4f", "#c8553d")[offset]
            axes.bar(places, [100 * k for k in kept.values()], 0.38, color=colour, label=label)
        axes.set_xticks([i + 0.2 for i in range(len(kept))])
        axes.set_xticklabels([kind.replace("_", "\n") for kind in kept], fontsize=8)
        axes.set_ylabel("accuracy after / before, %")
        axes.set_title(f"answers {how}, ρ = {results['mass']:g}", loc="left", fontsize=9.5)
        axes.legend(frameon=False, fontsize=8)
    points = [results["base"], *(p["kfac"] for p in reversed(results["sweep"]))]
    x = [p["perplexity"] for p in points]
    for key in ("memorization", *(f"{name}.generated" for name in results["tasks"])):
        style = "k--" if key == "memorization" else "-"
        y = [100 * p[key] for p in points]
        tasks.plot(x, y, style, marker=".", linewidth=1.4, label=key.removesuffix(".generated"))
    tasks.set_xlabel("perplexity on held-out prose")
    tasks.set_ylabel("passages recited, answers generated, %")
    tasks.set_title("K-FAC, every ρ", loc="left", fontsize=9.5)
    tasks.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    for axes in (generated, chosen, tasks):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
