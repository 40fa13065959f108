"""Dynamics: memorization and the curvature spectrum over the course of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

from torch import Tensor, nn

from curvfast.analysis.detector import memorization_scores
from curvfast.analysis.ratio import activation_ratio
from curvfast.analysis.separation import auc
from curvfast.baselines.svd import svd_basis
from curvfast.core.eigenbasis import Eigenbasis
from curvfast.core.spectrum import curvature_spectrum
from curvfast.demo.comparison import compare
from curvfast.demo.corpus import Corpus, load_corpus
from curvfast.demo.lm import prose_factors
from curvfast.demo.recipe import Recipe
from curvfast.editing import edited
from curvfast.evals.perplexity import perplexity
from curvfast.evals.suite import evaluate
from curvfast.lab.snapshots import restored, snapshots
from curvfast.report.dynamics import at, dynamics, over_layers, rise
from curvfast.studies.rounding import to_six_digits
from curvfast.studies.study import Figures, Lines, Study, StudyConfig, spread

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


def _measure(ask: StudyConfig) -> Figures:
    recipe = Recipe(
        seed=ask.seed, statistics_tokens=STATISTICS_TOKENS, held_out_windows=HELD_OUT_WINDOWS
    )
    recipe = recipe.quick() if ask.quick else recipe
    corpus = load_corpus(recipe)
    steps = checkpoints(recipe.steps)
    ask.say(f"training a small Llama, kept after {', '.join(map(str, steps))} steps (cached)")
    kept = snapshots(recipe, corpus, steps, ask.say)
    found = []
    for step, weights in kept.items():
        ask.say(f"step {step}: curvature, passages told from unseen ones, and the edit")
        found.append({"step": step, **_checkpoint(restored(recipe, weights), recipe, corpus)})
    return {
        "mass": recipe.mass,
        "fraction": FRACTION,
        # Exposures of each passage per step.
        "exposures": 2 * recipe.canary_rows / recipe.passages,
        "checkpoints": to_six_digits(found),
        "recipe": asdict(recipe),
    }


def _checkpoint(model: nn.Module, recipe: Recipe, corpus: Corpus) -> Figures:
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
