"""Curvature of memorized examples, each by itself and along the population's eigenpairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median

from torch import Tensor

from curvfast.analysis.examples import example_losses
from curvfast.analysis.gradients import gradient_energies
from curvfast.analysis.separation import auc
from curvfast.analysis.sharpness import input_curvature
from curvfast.core.corrections import POSITION
from curvfast.editing import edited
from curvfast.report.inversion import MODELS, inversion
from curvfast.studies.examples import Groups, pictures, texts
from curvfast.studies.study import Figures, Lines, Study, StudyConfig, spread

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


def _measure(ask: StudyConfig) -> Figures:
    return {name: _subject(groups_of(ask), ask) for name, groups_of in SUBJECTS.items()}


def _subject(groups: Groups, ask: StudyConfig) -> Figures:
    ask.say("curvature of each example alone, and where its gradient lies")
    kept = groups.basis.keep(mass=groups.mass)
    examples = {}
    for name, batches in groups.batches.items():
        around = {
            key: input_curvature(groups.model, batches, h=step * groups.unit, seed=ask.seed)
            for key, step in STEPS.items()
        }
        loss = around["curvature"].loss
        measure = partial(
            gradient_energies, groups.model, groups.basis, kept, batches, seed=ask.seed
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
