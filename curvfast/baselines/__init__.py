"""Comparisons: other ways to make a model forget, behind one call and with one report.

``BalancedSubnet(ratio=0.01).forget(model, memorized, clean)``, and so for every one of
:data:`RIVALS`; :class:`Rival` says what holds for all.
"""

from curvfast.baselines.balanced_subnet import BalancedSubnet
from curvfast.baselines.durable import Durable
from curvfast.baselines.gradient_ascent import GradientAscent
from curvfast.baselines.greedy import Greedy
from curvfast.baselines.npo import NPO
from curvfast.baselines.report import ForgetReport, LayerChange
from curvfast.baselines.rival import Rival
from curvfast.baselines.selections import RandomPairs
from curvfast.baselines.subnet import Subnet
from curvfast.baselines.svd import TruncatedSVD

__all__ = [
    "NPO",
    "RIVALS",
    "BalancedSubnet",
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

RIVALS: tuple[type[Rival], ...] = (
    BalancedSubnet, Subnet, Durable, Greedy, GradientAscent, NPO, TruncatedSVD, RandomPairs,
)  # fmt: skip
"""Every rival there is; the first six look at what is memorized."""
