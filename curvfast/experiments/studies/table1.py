"""Table 1: recitation and its cost, for edits and for a supervised baseline."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from statistics import mean
from typing import TYPE_CHECKING, Any, TypeVar

from curvfast.baselines import BalancedSubnet
from curvfast.baselines.curvature_free import svd_basis
from curvfast.collection.collect import collect_from
from curvfast.display import track
from curvfast.editing.edit import edited
from curvfast.errors import InputError
from curvfast.experiments.recipes import Recipe
from curvfast.experiments.studies.recital import HALVES, KINDS, SCORES, Table1Model, recital
from curvfast.experiments.studies.study import Figures, Lines, Study, StudyConfig, spread
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.kfac.select import select
from curvfast.kfac.selection.kept_pairs import Selection
from curvfast.report.style import METHOD_STYLES, plain
from curvfast.sweeps.frontier import between, first_crossing

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
                label, colour, marker = METHOD_STYLES[method]
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


Measures = Mapping[str, float]


def at_perplexity(
    base: Measures, points: Sequence[Measures], value: float
) -> dict[str, float] | None:
    """Return a method's measures at one perplexity, interpolated between strengths.

    Args:
        base: Measures of the unedited model, where every curve begins.
        points: Measures at each strength, weak to strong.
        value: The perplexity; where a curve reaches it more than once, the first time counts.

    Returns:
        The measures common to ``base`` and all points; None if the curve does not reach it.
    """
    curve = [base, *points]
    try:
        found = first_crossing([point["perplexity"] for point in curve], value)
    except InputError:
        return None
    names = [name for name in base if all(name in point for point in points)]
    weaker, stronger = curve[found.before], curve[found.after]
    return {name: between(weaker[name], stronger[name], found.share) for name in names}


EDITS = ("kfac", "svd")
MASSES = (0.99, 0.98, 0.97, 0.95)
"""ρ of the K-FAC edit, weak to strong; SVD keeps as much of each layer as that edit does."""
RATIOS = (0.02, 0.04, 0.08)
"""Shares of weights that BalancedSubnet drops, rising; the first is the library's default."""
TOLD = {"bsn": ("speeches_first", "bible_first"), "bsn_speeches": ("speeches_first",)}
"""Sets of passages that each BalancedSubnet is trained to forget."""
RISE = 0.05
LABELS = {
    "base": "unedited",
    "bsn": "BalancedSubnet, told of half of both kinds",
    "bsn_speeches": "BalancedSubnet, told of half the speeches",
    "kfac": "K-FAC edit",
    "svd": "truncated SVD",
}
_CLEAN_BATCHES = 8

Result = TypeVar("Result")


def _measure(config: StudyConfig) -> Figures:
    recipe = Recipe(seed=config.seed)
    recipe = recipe.quick() if config.quick else recipe
    config.report_stage(
        f"training a small Llama until it recites {recipe.passages} passages (cached)"
    )
    subject = recital(recipe)
    base = {**subject.measures(), "cpu_seconds": 0.0}
    stressed = {"base": subject.stressed()}
    config.report_stage("measuring curvature, and editing by it and by truncated SVD")
    curves, stressed["kfac"] = _edits(subject, recipe)
    rival = BalancedSubnet.for_small_models()
    rival = replace(rival, epochs=1) if config.quick else rival
    for name, told in TOLD.items():
        config.report_stage(f"{LABELS[name]}: {len(RATIOS)} strengths")
        curves[name] = [
            _subnet(subject, replace(rival, ratio=ratio), told, config.seed)
            for ratio in track(RATIOS, "strengths", len(RATIOS), "ratio")
        ]
    own = next(point["perplexity"] for point in curves["kfac"] if point["mass"] == recipe.mass)
    prices = {"rise": base["perplexity"] * (1 + RISE), "kfac": own}
    return {
        "base": base,
        "mass": recipe.mass,
        "curves": curves,
        "matched": {
            price: {name: at_perplexity(base, points, value) for name, points in curves.items()}
            for price, value in prices.items()
        },
        "stress": stressed,
        "told": TOLD,
        "rival": asdict(rival),
        "recipe": asdict(recipe),
    }


def _edits(subject: Table1Model, recipe: Recipe) -> tuple[dict[str, list[Figures]], Figures]:
    """Return a curve for each edit, and the stress test of the K-FAC edit at the recipe's ρ."""
    model = subject.model
    basis, basis_seconds = _timed(
        lambda: collect_from(
            model, subject.statistics, labels="sampled", tokens=recipe.statistics_tokens,
            seed=recipe.seed, progress=False,
        ).eigh()
    )  # fmt: skip
    singular, singular_seconds = _timed(lambda: svd_basis(model, basis))
    frames = {"kfac": (basis, basis_seconds), "svd": (singular, singular_seconds)}
    curves: dict[str, list[Figures]] = {}
    stressed: Figures = {}
    for method, (own, seconds) in frames.items():
        curves[method] = []
        for mass in MASSES:
            kept = basis.keep(mass=mass)
            started = time.process_time()
            size = kept.fractions
            chosen = kept if method == "kfac" else select(model, own, "svd", fraction=size)
            with edited(model, own, selection=chosen):
                spent = seconds + time.process_time() - started
                curves[method].append(
                    {"mass": mass, "kept_fraction": _share(basis, kept), "cpu_seconds": spent}
                    | subject.measures()
                )
                if method == "kfac" and mass == recipe.mass:
                    stressed = subject.stressed()
    return curves, stressed


def _share(basis: Eigenbasis, kept: Selection) -> float:
    total = sum(len(own.values_a) * len(own.values_g) for own in basis.values())
    return sum(kept.pairs.values()) / total


def _subnet(subject: Table1Model, rival: BalancedSubnet, told: Sequence[str], seed: int) -> Figures:
    """Run the baseline on the given passages, measure, and restore the weights."""
    model = subject.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    passages = [passage for name in told for passage in subject.passages[name]]
    clean = subject.statistics[:_CLEAN_BATCHES]
    try:
        _, spent = _timed(
            lambda: rival.forget(model, passages, clean, "mlp", seed=seed, progress=False)
        )
        return {"ratio": rival.ratio, "cpu_seconds": spent} | subject.measures()
    finally:
        model.load_state_dict(before)


def _timed(make: Callable[[], Result]) -> tuple[Result, float]:
    started = time.process_time()
    return make(), time.process_time() - started


def _tables(found: Sequence[Figures]) -> dict[str, Lines]:
    mass = found[0]["mass"]
    titles = {
        "as set": f"ρ = {mass:g}, SVD of that size, {RATIOS[0]:.0%} of weights dropped",
        f"at {RISE:+.0%}": f"perplexity {RISE:+.0%}",
        "at K-FAC's perplexity": f"perplexity of the K-FAC edit at ρ = {mass:g}",
    }
    chosen = (
        [_as_set(run) for run in found],
        [run["matched"]["rise"] for run in found],
        [run["matched"]["kfac"] for run in found],
    )
    tables = {}
    for (title, corner), runs in zip(titles.items(), chosen, strict=True):
        whole = [{"base": run["base"], **own} for run, own in zip(found, runs, strict=True)]
        tables[title] = _lines(whole, [corner, *_HEAD], _row)
        halves = ["recited word for word, %", *_HALVES_HEAD]
        tables[f"{title}, by half"] = _lines(whole, halves, _halves)
    tables["changed prompts"] = _stress(found)
    return tables


def _as_set(run: Figures) -> Figures:
    edits = {
        method: next(p for p in run["curves"][method] if p["mass"] == run["mass"])
        for method in EDITS
    }
    return {**{name: run["curves"][name][0] for name in TOLD}, **edits}


_SHORT = {"strict": "strict", "loose": "loose", "levenshtein": "Lev"}
_HEAD = [
    *(f"{kind} {_SHORT[score]}" for kind in ("speeches", "Bible") for score in SCORES),
    "perplexity", "on the Bible", "nDCG@10", "CPU s",
]  # fmt: skip
_HALVES_HEAD = [*(f"{kind}, {half} half" for kind in ("speeches", "Bible") for half in HALVES)]


def _lines(
    runs: Sequence[Figures], head: list[str], row: Callable[[Sequence[Figures]], list[str]]
) -> Lines:
    lines = [head]
    for name, label in LABELS.items():
        own = [run[name] for run in runs]
        cells = ["-"] * (len(head) - 1) if any(one is None for one in own) else row(own)
        lines.append([label, *cells])
    return lines


def _row(own: Sequence[Figures]) -> list[str]:
    cells = []
    for kind in KINDS:
        for score in SCORES:
            values = [mean(one[f"{kind}_{half}_{score}"] for half in HALVES) for one in own]
            distance = score == "levenshtein"
            cells.append(spread(values) if distance else _percent(values))
    forms = {"perplexity": "{:.1f}", "perplexity_bible": "{:.0f}", "ndcg": "{:.2f}"}
    cells += [spread([one[key] for one in own], form) for key, form in forms.items()]
    return [*cells, f"{mean(one['cpu_seconds'] for one in own):.2g}"]


def _halves(own: Sequence[Figures]) -> list[str]:
    return [
        _percent([one[f"{kind}_{half}_strict"] for one in own]) for kind in KINDS for half in HALVES
    ]


def _stress(found: Sequence[Figures]) -> Lines:
    models = {"base": "unedited", "kfac": "K-FAC edit"}
    lines = [
        [
            "passages recited to the end, %",
            *models.values(),
            *(f"{label}, tokens" for label in models.values()),
        ]
    ]
    for variant in found[0]["stress"]["base"]["variants"]:
        runs = {
            model: [run["stress"][model]["variants"][variant] for run in found] for model in models
        }
        recited = [_percent([one["recited"] for one in own]) for own in runs.values()]
        tokens = [spread([one["length"] for one in own], "{:.1f}") for own in runs.values()]
        lines.append([variant, *recited, *tokens])
    return lines


def _percent(values: Sequence[float]) -> str:
    return spread([100 * value for value in values], "{:.0f}")


STUDY = Study(_measure, _tables, rivals)
