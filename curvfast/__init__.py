"""The curvature of large networks, and the memorization it gives away.

Glossary:
    Kronecker factor: A = E[a aᵀ] of a linear layer's inputs a, or G = E[g gᵀ] of the gradients g of
        the summed loss with respect to its outputs; its Fisher block is about G ⊗ A.
    Second moment: the uncentred E[x xᵀ]; a Kronecker factor is one.
    Eigenbasis: eigenvectors U_A, U_G of the factors; the weight in it is C = U_Gᵀ W U_A.
    EK-FAC correction: Λ_ij, the mean squared gradient along eigenpair (i, j). It is λᵢ μⱼ where
        gradients and inputs are independent.
    Curvature mass: the sum of eigenpair products λᵢ μⱼ; a pair's mass is how much the population
        loss bends along it. LOW population curvature is where verbatim memorization lives: each
        memorized example bends the loss along a direction of its own, flat on average. HIGH
        curvature is shared by many examples: mechanisms that generalise.
    Staircase: the set of pairs with λᵢ μⱼ above a threshold; row i keeps its first width[i]
        columns.
    Activation ratio: how strongly some inputs excite a band of components, relative to others.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from curvfast._version import __version__ as __version__

if TYPE_CHECKING:
    from curvfast.analysis.detector import memorization_scores as memorization_scores
    from curvfast.analysis.mining import mine as mine
    from curvfast.analysis.ratio import activation_ratio as activation_ratio
    from curvfast.collection import collect as collect
    from curvfast.convergence import Converged as Converged
    from curvfast.core.corrections import Corrections as Corrections
    from curvfast.core.corrections import LayerCorrection as LayerCorrection
    from curvfast.core.eigenbasis import Eigenbasis as Eigenbasis
    from curvfast.core.eigenbasis import LayerBasis as LayerBasis
    from curvfast.core.factors import Factors as Factors
    from curvfast.core.factors import LayerFactors as LayerFactors
    from curvfast.core.mask import Mask as Mask
    from curvfast.core.selection import Selection as Selection
    from curvfast.core.staircase import Staircase as Staircase
    from curvfast.correcting import collect_corrections as collect_corrections
    from curvfast.correcting import correct as correct
    from curvfast.correction import Correction as Correction
    from curvfast.curvature import Curvature as Curvature
    from curvfast.driver import collect_from as collect_from
    from curvfast.edit_report import EditReport as EditReport
    from curvfast.editing import edit as edit
    from curvfast.editing import edited as edited
    from curvfast.errors import CurvfastError as CurvfastError
    from curvfast.errors import NumericalWarning as NumericalWarning
    from curvfast.evals.memorization import Passage as Passage
    from curvfast.evals.suite import EvalReport as EvalReport
    from curvfast.evals.suite import evaluate as evaluate
    from curvfast.hf.callback import CurvatureCallback as CurvatureCallback
    from curvfast.hf.factored import load_factored as load_factored
    from curvfast.hf.factored import save_factored as save_factored
    from curvfast.ops.registry import backends as backends
    from curvfast.ops.registry import use_backend as use_backend
    from curvfast.planning.plan import CollectionPlan as CollectionPlan
    from curvfast.planning.plan import plan_collection as plan_collection
    from curvfast.selecting import select as select
    from curvfast.sweeps.layer_search import LayerSearch as LayerSearch
    from curvfast.sweeps.layer_search import search_layers as search_layers
    from curvfast.sweeps.sweep import Sweep as Sweep
    from curvfast.sweeps.sweep import sweep as sweep
    from curvfast.writing.card import save_edited as save_edited
    from curvfast.writing.factored import FactorReport as FactorReport
    from curvfast.writing.factored import factorize as factorize
    from curvfast.writing.lora import export_lora as export_lora
    from curvfast.writing.patch import Patch as Patch
    from curvfast.writing.patch import make_patch as make_patch

# Loaded on first use: importing curvfast alone does not load torch.
_HOMES = {
    "memorization_scores": "analysis.detector",
    "mine": "analysis.mining",
    "activation_ratio": "analysis.ratio",
    "Curvature": "curvature",
    "collect": "collection",
    "Converged": "convergence",
    "Corrections": "core.corrections",
    "LayerCorrection": "core.corrections",
    "collect_corrections": "correcting",
    "correct": "correcting",
    "Correction": "correction",
    "Eigenbasis": "core.eigenbasis",
    "LayerBasis": "core.eigenbasis",
    "Factors": "core.factors",
    "LayerFactors": "core.factors",
    "Mask": "core.mask",
    "Selection": "core.selection",
    "Staircase": "core.staircase",
    "collect_from": "driver",
    "EditReport": "edit_report",
    "edit": "editing",
    "edited": "editing",
    "CurvfastError": "errors",
    "NumericalWarning": "errors",
    "Passage": "evals.memorization",
    "EvalReport": "evals.suite",
    "evaluate": "evals.suite",
    "CurvatureCallback": "hf.callback",
    "load_factored": "hf.factored",
    "save_factored": "hf.factored",
    "backends": "ops.registry",
    "use_backend": "ops.registry",
    "CollectionPlan": "planning.plan",
    "plan_collection": "planning.plan",
    "save_edited": "writing.card",
    "FactorReport": "writing.factored",
    "factorize": "writing.factored",
    "export_lora": "writing.lora",
    "Patch": "writing.patch",
    "make_patch": "writing.patch",
    "select": "selecting",
    "LayerSearch": "sweeps.layer_search",
    "search_layers": "sweeps.layer_search",
    "Sweep": "sweeps.sweep",
    "sweep": "sweeps.sweep",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'curvfast' has no attribute {name!r}")
    value = getattr(import_module(f"curvfast.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
