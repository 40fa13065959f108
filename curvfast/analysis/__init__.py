"""Analyses of memorization: activation ratios, detection, mining, stress tests, sharpness.

All of them leave the model as it was: modes, gradients, random state.
"""

from curvfast.analysis.correlation import correlation_interval as correlation_interval
from curvfast.analysis.correlation import pearson as pearson
from curvfast.analysis.correlation import spearman as spearman
from curvfast.analysis.detector import TextScores as TextScores
from curvfast.analysis.detector import discriminative_layers as discriminative_layers
from curvfast.analysis.detector import memorization_scores as memorization_scores
from curvfast.analysis.detector import telling_layers as telling_layers
from curvfast.analysis.examples import example_losses as example_losses
from curvfast.analysis.gradients import GradientEnergies as GradientEnergies
from curvfast.analysis.gradients import gradient_energies as gradient_energies
from curvfast.analysis.heat_map import heat_map as heat_map
from curvfast.analysis.heat_map import token_scores as token_scores
from curvfast.analysis.mining import Mined as Mined
from curvfast.analysis.mining import MiningReport as MiningReport
from curvfast.analysis.mining import mine as mine
from curvfast.analysis.ranking import ndcg as ndcg
from curvfast.analysis.ranking import top_tokens as top_tokens
from curvfast.analysis.ratio import ActivationRatio as ActivationRatio
from curvfast.analysis.ratio import activation_ratio as activation_ratio
from curvfast.analysis.recitation import leading_matches as leading_matches
from curvfast.analysis.separation import auc as auc
from curvfast.analysis.sharpness import InputCurvature as InputCurvature
from curvfast.analysis.sharpness import input_curvature as input_curvature
from curvfast.analysis.stress import StressReport as StressReport
from curvfast.analysis.stress import stress as stress
