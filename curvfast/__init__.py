"""K-FAC curvature of large networks, and weight edits that remove memorization.

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

from curvfast import _moved
from curvfast._version import __version__ as __version__

if TYPE_CHECKING:
    from curvfast.analysis.detector import memorization_scores as memorization_scores
    from curvfast.analysis.ratio import activation_ratio as activation_ratio
    from curvfast.collection.collect import collect as collect
    from curvfast.collection.collect import collect_from as collect_from
    from curvfast.collection.convergence import Converged as Converged
    from curvfast.collection.corrections import Correction as Correction
    from curvfast.collection.corrections import collect_corrections as collect_corrections
    from curvfast.collection.corrections import correct as correct
    from curvfast.collection.curvature import Curvature as Curvature
    from curvfast.editing.edit import edit as edit
    from curvfast.editing.edit import edited as edited
    from curvfast.editing.report import EditReport as EditReport
    from curvfast.errors import CurvfastError as CurvfastError
    from curvfast.errors import NumericalWarning as NumericalWarning
    from curvfast.evals.memorization import Passage as Passage
    from curvfast.evals.mining import mine as mine
    from curvfast.evals.suite import EvalReport as EvalReport
    from curvfast.evals.suite import evaluate as evaluate
    from curvfast.export.factored import FactorReport as FactorReport
    from curvfast.export.factored import factorize as factorize
    from curvfast.export.lora import export_lora as export_lora
    from curvfast.export.model_card import save_edited as save_edited
    from curvfast.export.patch import Patch as Patch
    from curvfast.export.patch import make_patch as make_patch
    from curvfast.hf.callback import CurvatureCallback as CurvatureCallback
    from curvfast.hf.factored import load_factored as load_factored
    from curvfast.hf.factored import save_factored as save_factored
    from curvfast.kfac.corrections import Corrections as Corrections
    from curvfast.kfac.corrections import LayerCorrection as LayerCorrection
    from curvfast.kfac.eigenbasis import Eigenbasis as Eigenbasis
    from curvfast.kfac.factors import Factors as Factors
    from curvfast.kfac.layer_basis import LayerBasis as LayerBasis
    from curvfast.kfac.layer_factors import LayerFactors as LayerFactors
    from curvfast.kfac.select import select as select
    from curvfast.kfac.selection.kept_pairs import Selection as Selection
    from curvfast.kfac.selection.mask import Mask as Mask
    from curvfast.kfac.selection.staircase import Staircase as Staircase
    from curvfast.ops.registry import backends as backends
    from curvfast.ops.registry import use_backend as use_backend
    from curvfast.planning.collection_plan import CollectionPlan as CollectionPlan
    from curvfast.planning.plan import plan_collection as plan_collection
    from curvfast.sweeps.layer_search import LayerSearch as LayerSearch
    from curvfast.sweeps.layer_search import search_layers as search_layers
    from curvfast.sweeps.sweep import Sweep as Sweep
    from curvfast.sweeps.sweep import sweep as sweep

_moved.install()

# Loaded on first use: importing curvfast alone does not load torch.
_HOMES = {
    "memorization_scores": "analysis.detector",
    "activation_ratio": "analysis.ratio",
    "collect": "collection.collect",
    "collect_from": "collection.collect",
    "Converged": "collection.convergence",
    "Correction": "collection.corrections",
    "collect_corrections": "collection.corrections",
    "correct": "collection.corrections",
    "Curvature": "collection.curvature",
    "edit": "editing.edit",
    "edited": "editing.edit",
    "EditReport": "editing.report",
    "CurvfastError": "errors",
    "NumericalWarning": "errors",
    "Passage": "evals.memorization",
    "mine": "evals.mining",
    "EvalReport": "evals.suite",
    "evaluate": "evals.suite",
    "FactorReport": "export.factored",
    "factorize": "export.factored",
    "export_lora": "export.lora",
    "save_edited": "export.model_card",
    "Patch": "export.patch",
    "make_patch": "export.patch",
    "CurvatureCallback": "hf.callback",
    "load_factored": "hf.factored",
    "save_factored": "hf.factored",
    "Corrections": "kfac.corrections",
    "LayerCorrection": "kfac.corrections",
    "Eigenbasis": "kfac.eigenbasis",
    "Factors": "kfac.factors",
    "LayerBasis": "kfac.layer_basis",
    "LayerFactors": "kfac.layer_factors",
    "select": "kfac.select",
    "Selection": "kfac.selection.kept_pairs",
    "Mask": "kfac.selection.mask",
    "Staircase": "kfac.selection.staircase",
    "backends": "ops.registry",
    "use_backend": "ops.registry",
    "CollectionPlan": "planning.collection_plan",
    "plan_collection": "planning.plan",
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
