"""Baselines: other methods of making a model forget, behind one call and with one report.

``BalancedSubnet(ratio=0.01).forget(model, memorized, clean)``, and so for every one of
:data:`RIVALS`; :meth:`Baseline.forget` documents the call.
"""

from curvfast.baselines.balanced_subnet import BalancedSubnet, Subnet
from curvfast.baselines.baseline import Baseline, ForgetReport, LayerChange, Rival
from curvfast.baselines.curvature_free import RandomPairs, TruncatedSVD
from curvfast.baselines.durable import Durable
from curvfast.baselines.gradient_ascent import GradientAscent
from curvfast.baselines.greedy import Greedy
from curvfast.baselines.npo import NPO

__all__ = [
    "NPO",
    "RIVALS",
    "BalancedSubnet",
    "Baseline",
    "Durable",
    "ForgetReport",
    "GradientAscent",
    "Greedy",
    "LayerChange",
    "RandomPairs",
    "Rival",
    "Subnet",
    "TruncatedSVD",
]

RIVALS: tuple[type[Baseline], ...] = (
    BalancedSubnet, Subnet, Durable, Greedy, GradientAscent, NPO, TruncatedSVD, RandomPairs,
)  # fmt: skip
"""Every baseline; the first six are supervised: they read what is memorized."""
