"""Quality of the marginals of EK-FAC, measured in one pass, against the full correction.

On the demo's trained model, layer by layer. At mass ρ the correction Λ itself keeps its N largest
entries. The marginals rᵢ cⱼ / ΣΛ, and K-FAC's λᵢ μⱼ, choose N pairs of their own; their share is
the Λ that those hold over the Λ that the best N hold. ``overlap`` is how many of the best N are
among them. Λ is per position; ``sequence`` judges by Λ per sequence, ``held_out`` by that of other
text, which no choice has seen.

python benchmarks/ekfac_marginals.py            print them
python benchmarks/ekfac_marginals.py --write    keep them in results/demo/ekfac-marginals.json
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import curvfast
from curvfast.errors import NumericalWarning
from curvfast.experiments.data.corpus import load_corpus
from curvfast.experiments.models.language import trained_model
from curvfast.experiments.recipes import Recipe
from curvfast.experiments.runs.demo_lm import prose
from curvfast.kfac.marginals import marginals_of
from curvfast.model.identity import versions
from curvfast.storage import write_json

RESULT = Path(__file__).parent / "results" / "demo" / "ekfac-marginals.json"
MASSES = (0.8, 0.9, 0.95)


def measure(recipe: Recipe, masses: tuple[float, ...] = MASSES) -> dict[str, Any]:
    """Return the shares of every layer at every mass."""
    corpus = load_corpus(recipe)
    model = trained_model(recipe, corpus)
    options: dict[str, Any] = {"tokens": recipe.statistics_tokens, "seed": recipe.seed}
    batches = prose(recipe, corpus)
    factors = curvfast.collect_from(model, batches, marginals=True, **options)
    basis = factors.eigh()
    exact = {
        per: curvfast.correct(model, basis, batches, per=per, **options)
        for per in ("position", "sequence")
    }
    other = replace(recipe, seed=recipe.seed + 1000)
    unseen = curvfast.correct(
        model, basis, prose(other, corpus), tokens=recipe.statistics_tokens, seed=other.seed
    )
    layers = {}
    for name, layer in basis.items():
        found = marginals_of(name, layer, factors[name])
        scores = {
            "marginals": torch.outer(found.rows, found.columns),
            "kfac": torch.outer(layer.values_g, layer.values_a),
        }
        truth = exact["position"][name].double()
        layers[name] = {
            str(mass): {
                "pairs": (kept := pairs_at(truth, mass)),
                "fraction": kept / truth.numel(),
                **shares(scores, truth, kept),
                "overlap": overlaps(scores, truth, kept),
                "held_out": shares({**scores, "full": truth}, unseen[name].double(), kept),
                "sequence": shares({**scores, "position": truth}, exact["sequence"][name], kept),
            }
            for mass in masses
        }
    return {
        "definition": " ".join((__doc__ or "").split("\n\n")[1].split()),
        "layers": layers,
        "worst": worst(layers, masses),
        "rows": factors.rows,
        "recipe": asdict(recipe),
        "versions": versions(),
    }


def pairs_at(truth: Tensor, mass: float) -> int:
    """Return how many of the largest entries reach ``mass`` of the sum."""
    sums = truth.flatten().sort(descending=True).values.cumsum(0)
    return int((sums < mass * sums[-1]).sum()) + 1


def shares(scores: dict[str, Tensor], truth: Tensor, pairs: int) -> dict[str, float]:
    """Return what the ``pairs`` largest by each score hold of ``truth``, over the most that can."""
    values = truth.flatten().double()
    best = float(values.topk(pairs).values.sum())
    return {
        name: float(values[score.flatten().topk(pairs).indices].sum()) / best
        for name, score in scores.items()
    }


def overlaps(scores: dict[str, Tensor], truth: Tensor, pairs: int) -> dict[str, float]:
    """Return how many of the ``pairs`` largest of ``truth`` each score chooses, as a share."""
    best = torch.zeros(truth.numel(), dtype=torch.bool)
    best[truth.flatten().topk(pairs).indices] = True
    return {
        name: float(best[score.flatten().topk(pairs).indices].double().mean())
        for name, score in scores.items()
    }


def worst(layers: dict[str, Any], masses: tuple[float, ...]) -> dict[str, dict[str, float]]:
    """Return the smallest share of any layer, by mass."""
    return {
        str(mass): {
            key: min(layer[str(mass)][key] for layer in layers.values())
            for key in ("marginals", "kfac")
        }
        for mass in masses
    }


def table(result: dict[str, Any]) -> str:
    """Return the shares as lines: marginals, then K-FAC, at each mass."""
    masses = list(result["worst"])
    lines = [
        f"{'share of the Λ that as many pairs can hold':<44}"
        + "".join(f"ρ {m:<16}" for m in masses)
    ]
    for name, layer in result["layers"].items():
        cells = (f"{layer[m]['marginals']:.4f} ({layer[m]['kfac']:.4f})  " for m in masses)
        lines.append(f"{name:<44}" + "".join(cells))
    return "\n".join([*lines, "in brackets: K-FAC's eigenvalues"])


if __name__ == "__main__":
    warnings.simplefilter("ignore", NumericalWarning)
    found = measure(Recipe())
    print(table(found))
    if "--write" in sys.argv[1:]:
        write_json(RESULT, found)
