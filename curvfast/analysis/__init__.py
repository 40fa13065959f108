"""Analyses of memorization: activation ratios, detection, mining, stress tests, sharpness.

All of them leave the model as it was: modes, gradients, random state.
"""

from curvfast.analysis.detector import TextScores as TextScores
from curvfast.analysis.detector import discriminative_layers as discriminative_layers
from curvfast.analysis.detector import memorization_scores as memorization_scores
from curvfast.analysis.detector import telling_layers as telling_layers
from curvfast.analysis.gradients import GradientEnergies as GradientEnergies
from curvfast.analysis.gradients import gradient_energies as gradient_energies
from curvfast.analysis.heat_map import heat_map as heat_map
from curvfast.analysis.heat_map import token_scores as token_scores
from curvfast.analysis.per_example import example_losses as example_losses
from curvfast.analysis.ratio import ActivationRatio as ActivationRatio
from curvfast.analysis.ratio import activation_ratio as activation_ratio
from curvfast.analysis.sharpness import InputCurvature as InputCurvature
from curvfast.analysis.sharpness import input_curvature as input_curvature
from curvfast.analysis.statistics import auc as auc
from curvfast.analysis.statistics import correlation_interval as correlation_interval
from curvfast.analysis.statistics import pearson as pearson
from curvfast.analysis.statistics import spearman as spearman
from curvfast.evals.mining import Mined as Mined
from curvfast.evals.mining import MiningReport as MiningReport
from curvfast.evals.mining import mine as mine
from curvfast.evals.ranking import ndcg as ndcg
from curvfast.evals.ranking import top_tokens as top_tokens
from curvfast.evals.recitation import leading_matches as leading_matches
from curvfast.evals.stress import StressReport as StressReport
from curvfast.evals.stress import stress as stress
