"""Dynamics: memorization and the curvature spectrum over the course of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import mean
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from curvfast.analysis.detector import memorization_scores
from curvfast.analysis.ratio import activation_ratio
from curvfast.analysis.statistics import auc
from curvfast.baselines.curvature_free import svd_basis
from curvfast.editing.edit import edited
from curvfast.evals.perplexity import perplexity
from curvfast.evals.suite import evaluate
from curvfast.experiments.data.corpus import TokenizedCorpus, load_corpus
from curvfast.experiments.models.language import restored, snapshots
from curvfast.experiments.recipes import Recipe
from curvfast.experiments.runs.comparison import compare
from curvfast.experiments.runs.demo_lm import prose_factors
from curvfast.experiments.studies.study import (
    Figures,
    Lines,
    Study,
    StudyConfig,
    spread,
    to_six_digits,
)
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.kfac.spectrum import curvature_spectrum
from curvfast.report.style import METHOD_STYLES, plain

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
        "kfac": (f"K-FAC, ρ = {mass:g}", METHOD_STYLES["kfac"][1], "-"),
        "svd": ("SVD of that size", METHOD_STYLES["svd"][1], "-"),
        "fixed": (f"K-FAC, {fraction:.0%} of the pairs", METHOD_STYLES["kfac"][1], ":"),
    }
    line(recited, at("base", "strict", scale=100), "unedited", METHOD_STYLES["base"][1])
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
        METHOD_STYLES["kfac"][1],
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


PARTS = 8
"""Number of equal intervals between checkpoints."""
STATISTICS_TOKENS = 20_000
HELD_OUT_WINDOWS = 120
FRACTION = 0.35
"""Of the pairs: ρ = 0.95 keeps as many of the trained model, and others of the earlier ones."""
READS = {"residual": "*.up_proj", "hidden": "*.down_proj"}
"""Layers by their input: the residual stream, or the hidden activations of the MLP."""
_ROWS = 16

Column = tuple[str, Callable[[Figures], float], int]
"""Heading, reader of a checkpoint's figure, and decimals."""


def checkpoints(steps: int) -> list[int]:
    """Return the steps of a training's checkpoints, including its beginning and end."""
    return sorted({round(part * steps / PARTS) for part in range(PARTS + 1)})


def with_start(passages: Tensor) -> Tensor:
    """Return passages [n, length] as [n, 1 + length], an end-of-text token before each."""
    return nn.functional.pad(passages, (1, 0))


def spectrum_figures(basis: Eigenbasis, mass: float) -> dict[str, dict[str, float]]:
    """Return statistics of the spectrum of each layer.

    Args:
        basis: Eigenbases by layer name.
        mass: ρ.

    Returns:
        By layer ``rank_a`` and ``rank_g`` (effective ranks, as shares of d_in and of d_out),
        ``kept`` (share of the pairs that holds ρ of the curvature mass) and ``flattest_half`` (of
        the mass in the smaller half of the pairs).
    """
    kept = basis.keep(mass=mass).fractions
    found = {}
    for name in basis:
        layer = curvature_spectrum(basis[name].values_g, basis[name].values_a, ())
        found[name] = {
            "rank_a": layer.effective_rank_a / layer.d_in,
            "rank_g": layer.effective_rank_g / layer.d_out,
            "kept": kept[name],
            "flattest_half": layer.flattest_half,
        }
    return found


def _measure(config: StudyConfig) -> Figures:
    recipe = Recipe(
        seed=config.seed, statistics_tokens=STATISTICS_TOKENS, held_out_windows=HELD_OUT_WINDOWS
    )
    recipe = recipe.quick() if config.quick else recipe
    corpus = load_corpus(recipe)
    steps = checkpoints(recipe.steps)
    config.report_stage(
        f"training a small Llama, kept after {', '.join(map(str, steps))} steps (cached)"
    )
    kept = snapshots(recipe, corpus, steps, config.report_stage)
    found = []
    for step, weights in kept.items():
        config.report_stage(f"step {step}: curvature, passages told from unseen ones, and the edit")
        found.append({"step": step, **_checkpoint(restored(recipe, weights), recipe, corpus)})
    return {
        "mass": recipe.mass,
        "fraction": FRACTION,
        # Exposures of each passage per step.
        "exposures": 2 * recipe.canary_rows / recipe.passages,
        "checkpoints": to_six_digits(found),
        "recipe": asdict(recipe),
    }


def _checkpoint(model: nn.Module, recipe: Recipe, corpus: TokenizedCorpus) -> Figures:
    text = corpus.held_out.split(_ROWS)

    def measure(model: nn.Module) -> dict[str, float]:
        return evaluate(model, passages=corpus.passages(), text=text).to_dict()

    planted, unseen = (with_start(rows) for rows in (corpus.canaries, corpus.controls))
    basis = prose_factors(model, recipe, corpus, progress=False).eigh()
    methods = ("kfac", "svd")
    edits = compare(
        model, basis, svd_basis(model, basis), recipe.mass, measure, seed=recipe.seed,
        methods=methods,
    )  # fmt: skip
    with edited(model, basis, fraction=FRACTION):
        fixed = measure(model)
    return {
        "base": measure(model),
        "planted_perplexity": perplexity(model, planted.split(_ROWS)),
        "unseen_perplexity": perplexity(model, unseen.split(_ROWS)),
        "spectrum": spectrum_figures(basis, recipe.mass),
        **_separation(model, basis, planted, unseen),
        **{method: edits[method] for method in methods},
        "fixed": fixed,
    }


def _separation(model: nn.Module, basis: Eigenbasis, planted: Tensor, unseen: Tensor) -> Figures:
    """Return how planted passages differ from unseen ones of the same sources, by layers' input."""
    batches = [rows.split(_ROWS) for rows in (planted, unseen)]
    scores = [memorization_scores(model, basis, rows, progress=False) for rows in batches]
    areas, bands = {}, {}
    for name, layers in READS.items():
        areas[name] = auc(*(each.of(layers) for each in scores))
        ratio = activation_ratio(
            model, basis, batches[0], batches[1], layers, samples=0, progress=False
        )
        bands[name] = ratio.ratio.mean(0).tolist()
    return {"auc": areas, "ratio": bands}


def _tables(found: Sequence[Figures]) -> dict[str, Lines]:
    mass, fraction = found[0]["mass"], found[0]["fraction"]
    shares = {"rank_a": "effective rank of A, %", "rank_g": "of G, %", "kept": "pairs kept, %"}
    edits = {"kfac": f"ρ = {mass:g}", "svd": "SVD of that size", "fixed": f"{fraction:.0%} kept"}
    tables: dict[str, list[Column]] = {
        "text": [
            ("recited, %", at("base", "strict", scale=100), 1),
            ("perplexity: planted", at("planted_perplexity"), 1),
            ("unseen", at("unseen_perplexity"), 1),
            ("held-out", at("base", "perplexity"), 1),
        ],
        f"spectrum, ρ = {mass:g}": [(label, over_layers(key), 1) for key, label in shares.items()],
        "planted against unseen": [
            (f"{name}: {label}", at(*path), 3)
            for name in READS
            for label, path in {
                "AUC": ("auc", name),
                "top band": ("ratio", name, 0),
                "bottom band": ("ratio", name, -1),
            }.items()
        ],
        "after an edit": [
            column
            for key, label in edits.items()
            for column in (
                (f"{label}: recited, %", at(key, "strict", scale=100), 1),
                ("perplexity, + %", rise(key), 1),
            )
        ],
    }
    moments = list(zip(*(run["checkpoints"] for run in found), strict=True))
    return {
        heading: [["step", *(head for head, _, _ in columns)], *_rows(moments, columns)]
        for heading, columns in tables.items()
    }


def _rows(moments: Sequence[Sequence[Figures]], columns: Sequence[Column]) -> Lines:
    """Return a table row per checkpoint, over all seeds."""
    return [
        [f"{each[0]['step']}", *(spread([*map(of, each)], f"{{:.{n}f}}") for _, of, n in columns)]
        for each in moments
    ]


STUDY = Study(_measure, _tables, dynamics)
