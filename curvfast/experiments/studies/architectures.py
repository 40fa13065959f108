"""The edit on an LSTM and an MLP-Mixer, beside a Llama and a vision transformer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from curvfast.baselines.curvature_free import svd_basis
from curvfast.evals.suite import evaluate
from curvfast.experiments.data.corpus import TokenizedCorpus, load_corpus
from curvfast.experiments.data.images import NoisySplit, mnist, noisy_split
from curvfast.experiments.models.language import trained_model
from curvfast.experiments.models.lstm import LstmRecipe, trained_lstm
from curvfast.experiments.models.mixer import trained_mixer
from curvfast.experiments.models.vit import accuracies, trained_vit
from curvfast.experiments.recipes import RECIPES, Recipe, Statistics, VitRecipe
from curvfast.experiments.runs.comparison import compare
from curvfast.experiments.runs.demo_lm import prose_factors
from curvfast.experiments.runs.lab_vit import vit_basis
from curvfast.experiments.studies.study import (
    Figures,
    Lines,
    Study,
    StudyConfig,
    spread,
    to_six_digits,
)
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.model.layers import LayerSpec
from curvfast.report.style import METHOD_STYLES, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_TITLES = {
    "llama": "Llama, all MLPs",
    "lstm": "LSTM, all gates",
    "vit": "vision transformer, all MLPs",
    "mixer": "MLP-Mixer, all MLPs",
}
_TEXT = ("passages recited, %", "perplexity, after / before (log scale)")
_IMAGES = ("wrong labels kept, %", "validation, after - before, points")
# Axis limits: beyond these an edit has destroyed the model.
_WORST_RATIO, _WORST_POINTS = 3.0, -35.0


def architectures(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw memorization against remaining quality, over ρ.

    Args:
        runs: Results of the study ``architectures``, one a seed.

    Returns:
        A panel an architecture, a thin line a seed: K-FAC, and SVD that keeps as much. In each,
        the lower left is better of text, the upper left of images.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 7.6), layout="constrained", dpi=140)
    for axes, name in zip(figure.subplots(2, 2).flat, runs[0], strict=True):
        for number, run in enumerate(runs):
            _seed(axes, run[name], labelled=number == 0)
        text = runs[0][name]["quality"] == "perplexity"
        across, up = _TEXT if text else _IMAGES
        axes.set_title(
            f"{_TITLES[name]} ({runs[0][name]['parameters'] / 1e6:.1f} million weights)",
            loc="left", fontsize=10,
        )  # fmt: skip
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.set_xlim(-3, 103)
        if text:
            axes.set_yscale("log")
            axes.set_yticks([1, 1.1, 1.25, 1.5, 2, 3], minor=False)
            axes.minorticks_off()
            axes.yaxis.set_major_formatter("×{x:g}")
            axes.set_ylim(0.95, _WORST_RATIO * 1.05)
        else:
            axes.set_ylim(bottom=_WORST_POINTS)
        axes.legend(frameon=False, fontsize=8)
        plain(axes)
    return figure


def _seed(axes: Axes, run: Mapping[str, Any], *, labelled: bool) -> None:
    for method in ("kfac", "svd"):
        label, colour, marker = METHOD_STYLES[method]
        points = [*(point[method] for point in run["sweep"]), run["base"]]
        axes.plot(
            [100 * point["memorized"] for point in points], [_left(run, p) for p in points],
            color=colour, marker=marker, markersize=3.5, linewidth=1, alpha=0.75,
            label=label if labelled else None,
        )  # fmt: skip
    label, colour, marker = METHOD_STYLES["base"]
    axes.plot(
        100 * run["base"]["memorized"], _left(run, run["base"]), marker=marker, color=colour,
        markersize=11, linestyle="none", label=label if labelled else None,
    )  # fmt: skip


def _left(run: Mapping[str, Any], point: Mapping[str, float]) -> float:
    """Return the change of quality: a ratio of perplexities, or points of accuracy."""
    if run["quality"] == "perplexity":
        return point["quality"] / float(run["base"]["quality"])
    return 100 * (point["quality"] - float(run["base"]["quality"]))


MASSES = (0.8, 0.9, 0.95, 0.98, 0.99)
METHODS = ("kfac", "svd")
MOST_LEFT = 1 / 3
"""Share of memorization left by the edit at which methods are compared."""
STATISTICS_TOKENS = 20_000
HELD_OUT_WINDOWS = 120
TITLES = {
    "llama": "Llama: MLPs",
    "lstm": "LSTM: gates",
    "vit": "ViT: MLPs",
    "mixer": "MLP-Mixer: MLPs",
}
QUALITY = {
    "llama": "perplexity", "lstm": "perplexity", "vit": "validation", "mixer": "validation",
}  # fmt: skip
_ROWS = 16

Measure = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True)
class JudgedModel:
    """A trained model, its eigenbasis, and the function that measures it."""

    model: nn.Module
    basis: Eigenbasis
    measure: Measure
    """Returns ``memorized``, ``quality`` and further figures."""


def _measure(config: StudyConfig) -> Figures:
    found = {}
    for name, subject in _subjects(config):
        config.report_stage(f"editing the {name}: every ρ, against SVD of that size")
        base = subject.measure(subject.model)
        singular = svd_basis(subject.model, subject.basis)
        found[name] = {
            "base": base,
            "quality": QUALITY[name],
            "layers": len(subject.basis),
            "parameters": sum(p.numel() for p in subject.model.parameters()),
            "sweep": [
                compare(
                    subject.model, subject.basis, singular, mass, subject.measure, seed=config.seed,
                    methods=METHODS,
                )
                for mass in MASSES
            ],
        }  # fmt: skip
    return dict(to_six_digits(found))


def _subjects(config: StudyConfig) -> Iterator[tuple[str, JudgedModel]]:
    text = Recipe(
        seed=config.seed, statistics_tokens=STATISTICS_TOKENS, held_out_windows=HELD_OUT_WINDOWS
    )
    text = text.quick() if config.quick else text
    corpus = load_corpus(text)
    config.report_stage("training a small Llama (cached)")
    yield (
        "llama",
        text_subject(trained_model(text, corpus, config.report_stage), text, corpus, "mlp"),
    )
    lstm = LstmRecipe(text)
    lstm = lstm.quick() if config.quick else lstm
    config.report_stage("training an LSTM on the same text (cached)")
    yield (
        "lstm",
        text_subject(trained_lstm(lstm, corpus, config.report_stage), text, corpus, "cells.*"),
    )
    vit = replace(RECIPES["mnist"], seed=config.seed)
    vit = vit.quick() if config.quick else vit
    first, second = mnist()
    split = noisy_split(
        first, second, train=vit.train_images, fresh=vit.fresh_images,
        validation=vit.validation_images, noise=vit.noise, seed=vit.seed,
    )  # fmt: skip
    config.report_stage(f"training a small ViT on digits, {vit.noise:.0%} wrong labels (cached)")
    yield "vit", image_subject(trained_vit(vit, split, config.report_stage), vit, split)
    # As many weights as the vision transformer.
    mixer = vit if config.quick else replace(vit, hidden=76, mlp=304)
    config.report_stage("training an MLP-Mixer on the same digits (cached)")
    yield "mixer", image_subject(trained_mixer(mixer, split, config.report_stage), mixer, split)


def text_subject(
    model: nn.Module, recipe: Recipe, corpus: TokenizedCorpus, layers: LayerSpec
) -> JudgedModel:
    """Return a language model with its curvature on prose.

    Args:
        model: It takes ``input_ids`` and returns ``logits``.
        recipe: Tokens of the statistics, and seed.
        corpus: Source of prose, memorized passages and held-out text.
        layers: Which linear layers, as in :func:`curvfast.collect`.

    Returns:
        The subject; ``memorized`` is the share of passages recited, ``quality`` the perplexity.
    """
    held_out = corpus.held_out.split(_ROWS)

    def measure(model: nn.Module) -> dict[str, float]:
        report = evaluate(model, passages=corpus.passages(), text=held_out).to_dict()
        return {
            "memorized": report["strict"],
            "quality": report["perplexity"],
            "loose": report["loose"],
        }

    return JudgedModel(model, prose_factors(model, recipe, corpus, layers).eigh(), measure)


def image_subject(model: nn.Module, recipe: VitRecipe, split: NoisySplit) -> JudgedModel:
    """Return an image classifier with its curvature on fresh pictures.

    Args:
        model: It takes ``pixel_values`` and returns ``logits``.
        recipe: Recipe of its training, with the seed.
        split: Images with wrong labels, fresh ones and those for validation.

    Returns:
        The subject; ``memorized`` is the share of wrong labels kept, ``quality`` the accuracy on
        validation.
    """

    def measure(model: nn.Module) -> dict[str, float]:
        shares = accuracies(model, split)
        return {
            "memorized": shares["memorized"],
            "quality": shares["validation"],
            "ground_truth": shares["ground_truth"],
        }

    basis = vit_basis(model, split, Statistics(), layers="mlp", seed=recipe.seed)
    return JudgedModel(model, basis, measure)


def chosen_mass(run: Figures) -> float:
    """Return the largest ρ whose K-FAC edit leaves at most a third of the memorization.

    Args:
        run: ``base`` and ``sweep`` of one architecture.

    Returns:
        That ρ; the smallest of the sweep if there is none.
    """
    enough = [
        point["mass"]
        for point in run["sweep"]
        if point["kfac"]["memorized"] <= run["base"]["memorized"] * MOST_LEFT
    ]
    return float(max(enough, default=min(point["mass"] for point in run["sweep"])))


def _tables(found: Sequence[Figures]) -> dict[str, Lines]:
    # ρ is chosen on the first seed and evaluated on the others.
    judged = list(found[1:] or found)
    head = ["architecture", "ρ", "pairs kept, %", "memorized, %", "K-FAC", "SVD"]
    lines = [[*head, "quality", "K-FAC", "SVD"]]
    for name in found[0]:
        mass = chosen_mass(found[0][name])
        lines.append([TITLES[name], f"{mass:g}", *_cells([run[name] for run in judged], mass)])
    return {
        "all, ρ chosen on the first seed and judged on the others": lines,
        **{TITLES[name]: _sweep([run[name] for run in found]) for name in found[0]},
    }


def _sweep(runs: Sequence[Figures]) -> Lines:
    quality = runs[0]["quality"]
    head = ["ρ", "pairs kept, %", "memorized, %", "K-FAC", "SVD", quality, "K-FAC", "SVD"]
    masses = [point["mass"] for point in runs[0]["sweep"]]
    return [head, *([f"{mass:g}", *_cells(runs, mass)] for mass in masses)]


def _cells(runs: Sequence[Figures], mass: float) -> list[str]:
    """Return kept pairs, memorization and quality: unedited, by K-FAC, by SVD."""
    points = [next(p for p in run["sweep"] if p["mass"] == mass) for run in runs]
    share = 100 if runs[0]["quality"] == "validation" else 1
    cells = [spread([100 * point["kfac"]["kept_fraction"] for point in points], "{:.0f}")]
    for key, scale, form in (("memorized", 100, "{:.0f}"), ("quality", share, "{:.1f}")):
        cells.append(spread([scale * run["base"][key] for run in runs], form))
        cells += [spread([scale * point[how][key] for point in points], form) for how in METHODS]
    return cells


STUDY = Study(_measure, _tables, architectures)
