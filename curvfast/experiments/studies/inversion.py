"""Curvature of memorized examples, each by itself and along the population's eigenpairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import ceil, floor, log10
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from torch import Tensor

from curvfast.analysis.gradients import gradient_energies
from curvfast.analysis.per_example import example_losses
from curvfast.analysis.sharpness import input_curvature
from curvfast.analysis.statistics import auc
from curvfast.editing.edit import edited
from curvfast.experiments.studies.examples import Groups, pictures, texts
from curvfast.experiments.studies.study import Figures, Lines, Study, StudyConfig, spread
from curvfast.kfac.corrections import POSITION
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


SUBJECTS: Mapping[str, Callable[[StudyConfig], Groups]] = {"lab_vit": pictures, "demo_lm": texts}
STEPS = {"curvature": 1e-3, "curvature_mid": 0.1, "curvature_far": 1.0}
"""How far probes go, in root mean squares of the input: where it is certain, a loss is flat nearby
and may have walls further off."""
MEASURES = {
    "loss": "loss",
    **{key: f"input curvature, step {step:g}" for key, step in STEPS.items()},
    "sharpness": "Fisher trace of the weights",
    "flat": "Fisher share in removed pairs",
    "flat_positions": "the same, position by position",
    "flat_own": "own gradient's share there",
    "population": "population's curvature along it",
    "rise": "loss added by removing the pairs",
}
"""Measures of each example; ``population`` is the curvature along its own gradient."""
GROUPS = ("memorized", "seen", "unseen")
AREAS = ("AUC against seen", "against unseen")
_DIGITS = "{:.4g}"


def _measure(config: StudyConfig) -> Figures:
    return {name: _subject(groups_of(config), config) for name, groups_of in SUBJECTS.items()}


def _subject(groups: Groups, config: StudyConfig) -> Figures:
    config.report_stage("curvature of each example alone, and where its gradient lies")
    kept = groups.basis.keep(mass=groups.mass)
    examples = {}
    for name, batches in groups.batches.items():
        around = {
            key: input_curvature(groups.model, batches, h=step * groups.unit, seed=config.seed)
            for key, step in STEPS.items()
        }
        loss = around["curvature"].loss
        measure = partial(
            gradient_energies, groups.model, groups.basis, kept, batches, seed=config.seed
        )
        fisher, rows, gold = measure(), measure(per=POSITION), measure(labels="gold")
        with edited(groups.model, groups.basis, selection=kept):
            after = example_losses(groups.model, batches)
        found = {
            "loss": loss,
            **{key: own.curvature for key, own in around.items()},
            "sharpness": fisher.sharpness(),
            "flat": fisher.flat_share(),
            "flat_positions": rows.flat_share(),
            "flat_own": gold.flat_share(),
            "population": gold.population_curvature(),
            "rise": after - loss,
        }
        examples[name] = {key: _short(values) for key, values in found.items()}
    memorized = examples["memorized"]
    shares = {name: stair.fraction for name, stair in kept.items()}
    return {
        "mass": groups.mass,
        "kept_fraction": sum(shares.values()) / len(shares),
        "fitted": groups.fitted,
        "examples": examples,
        "auc": {
            other: {key: auc(memorized[key], examples[other][key]) for key in MEASURES}
            for other in ("seen", "unseen")
        },
    }


def _short(values: Tensor) -> list[float]:
    return [float(_DIGITS.format(value)) for value in values.tolist()]


def _tables(found: Sequence[Figures]) -> dict[str, Lines]:
    tables = {}
    for name, title in MODELS.items():
        runs = [each[name] for each in found]
        lines = [[f"median example, ρ = {runs[0]['mass']:g}", *GROUPS, *AREAS]]
        lines.append(
            ["labels that come first, %"]
            + [spread([100 * run["fitted"][group] for run in runs], "{:.0f}") for group in GROUPS]
            + ["", ""]
        )
        for key, label in MEASURES.items():
            middles = [
                spread([median(run["examples"][group][key]) for run in runs], "{:.3g}")
                for group in GROUPS
            ]
            areas = [spread([run["auc"][other][key] for run in runs]) for other in runs[0]["auc"]]
            lines.append([label, *middles, *areas])
        tables[title] = lines
    return tables


STUDY = Study(_measure, _tables, inversion)
