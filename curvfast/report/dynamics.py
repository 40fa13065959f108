"""Figure of the study ``dynamics``: memorization and spectra during a training, over seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from curvfast.report.style import METHODS, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PLANTED, _UNSEEN, _HELD_OUT = "#c8553d", "#8d99ae", "#1b1b1e"
_READS = {"residual": "reads the residual stream", "hidden": "reads inside the MLP"}

Of = Callable[[Mapping[str, Any]], float]
"""A figure of one checkpoint."""


def at(*path: str | int, scale: float = 1.0) -> Of:
    """Return a reader of the figure under these keys, times ``scale``."""

    def of(point: Mapping[str, Any]) -> float:
        value: Any = point
        for key in path:
            value = value[key]
        return scale * float(value)

    return of


def over_layers(key: str) -> Of:
    """Return a reader of a share of the spectrum, in percent, averaged over layers."""
    return lambda point: 100 * mean(layer[key] for layer in point["spectrum"].values())


def rise(key: str) -> Of:
    """Return a reader of an edit's rise of perplexity, in percent."""

    def of(point: Mapping[str, Any]) -> float:
        return 100 * (float(point[key]["perplexity"]) / float(point["base"]["perplexity"]) - 1)

    return of


def dynamics(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw recitation and statistics of the spectrum over the steps of a training.

    Args:
        runs: Results of the study ``dynamics``, one a seed.

    Returns:
        Six panels over one axis of steps, a thin line a seed and a thick one their mean: passages
        recited, before and after an edit; perplexity; what the edit costs; effective ranks and the
        pairs that hold ρ; the detector's AUC; activation ratios of the outer bands.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.4, 15), layout="constrained", dpi=130)
    panels = figure.subplots(6, 1, sharex=True)
    recited, texts, cost, spectrum, areas, bands = panels
    mass, fraction = runs[0]["mass"], runs[0]["fraction"]

    def line(axes: Axes, of: Of, label: str, colour: str, style: str = "-") -> None:
        _line(axes, runs, of, label, colour, style)

    edits = {
        "kfac": (f"K-FAC, ρ = {mass:g}", METHODS["kfac"][1], "-"),
        "svd": ("SVD of that size", METHODS["svd"][1], "-"),
        "fixed": (f"K-FAC, {fraction:.0%} of the pairs", METHODS["kfac"][1], ":"),
    }
    line(recited, at("base", "strict", scale=100), "unedited", METHODS["base"][1])
    for key, (label, colour, style) in edits.items():
        line(recited, at(key, "strict", scale=100), label, colour, style)
        line(cost, rise(key), label, colour, style)
    recited.set_ylabel("passages recited, %")
    recited.set_ylim(-4, 104)
    line(texts, at("planted_perplexity"), "planted passages", _PLANTED)
    line(texts, at("unseen_perplexity"), "unseen, of the same sources", _UNSEEN)
    line(texts, at("base", "perplexity"), "held-out speeches", _HELD_OUT)
    texts.set_yscale("log")
    texts.yaxis.set_major_formatter("{x:g}")
    texts.set_ylabel("perplexity (log scale)")
    cost.set_ylabel("perplexity an edit adds, %")
    names = {"rank_a": "effective rank of A", "rank_g": "effective rank of G"}
    for (key, label), colour in zip(names.items(), (_HELD_OUT, _UNSEEN), strict=True):
        line(spectrum, over_layers(key), label, colour)
    line(
        spectrum, over_layers("kept"), f"pairs that hold {mass:g} of the mass",
        METHODS["kfac"][1],
    )  # fmt: skip
    spectrum.set_ylabel("share of all, % (mean of layers)")
    spectrum.set_ylim(bottom=0)
    for (key, label), style in zip(_READS.items(), ("-", "--"), strict=True):
        line(areas, at("auc", key), label, _PLANTED, style)
        for band, place, colour in (("flattest half", -1, _PLANTED), ("top tenth", 0, _HELD_OUT)):
            line(
                bands, at("ratio", key, place),
                f"{band}, {label}", colour, style,
            )  # fmt: skip
    areas.axhline(0.5, color=_UNSEEN, linewidth=0.8)
    areas.set_ylabel("AUC, planted against unseen")
    bands.axhline(1, color=_UNSEEN, linewidth=0.8)
    bands.set_ylabel("activation, planted / unseen")
    bands.set_xlabel("optimizer step")
    low, high = bands.get_ylim()
    bands.set_ylim(low, high + 0.3 * (high - low))
    for axes in panels:
        columns = 2 if axes is bands else 1
        axes.legend(frameon=False, fontsize=8, handlelength=3, loc="best", ncols=columns)
        plain(axes)
    shown = runs[0]["exposures"] * runs[0]["checkpoints"][-1]["step"]
    figure.suptitle(
        f"A small Llama learns prose, and passages shown {shown:.0f} times each", fontsize=11,
        x=0.01, horizontalalignment="left",
    )  # fmt: skip
    return figure


def _line(
    axes: Axes, runs: Sequence[Mapping[str, Any]], of: Of, label: str, colour: str, style: str
) -> None:
    steps = [point["step"] for point in runs[0]["checkpoints"]]
    values = [[of(point) for point in run["checkpoints"]] for run in runs]
    for own in values:
        axes.plot(steps, own, style, color=colour, linewidth=0.6, alpha=0.5)
    middle = [mean(each) for each in zip(*values, strict=True)]
    axes.plot(steps, middle, style, color=colour, linewidth=1.8, marker=".", label=label)
