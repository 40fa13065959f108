"""Subnet: BalancedSubnet on memorized text alone.

Sakarvadia et al., "Mitigating Memorization in Language Models", ICLR 2025, arXiv 2410.02159.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from curvfast.baselines.balanced_subnet import BalancedSubnet
from curvfast.baselines.rival import ForgetTask, Supervised, Trained


@dataclass(frozen=True)
class Subnet(Supervised):
    """Drops the weights of smallest learnt |score|; loss −CE(memorized).

    Exactly round(ratio · weights) of each layer become zero.
    """

    ratio: float = 0.01
    """Share of each matrix's weights that is dropped, in (0, 1)."""
    learning_rate: float = 0.1
    """Learning rate of SGD on the scores."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    epochs: int = 5
    """Passes over the memorized rows."""
    batch_size: int = 64
    """Rows in a step, at most."""
    scored: str = "all"
    """Which tokens of a memorized passage count: ``"all"``, or ``"suffix"``."""

    def __post_init__(self) -> None:
        """Check the hyper-parameters."""
        self._masking()

    @classmethod
    def for_small_models(cls) -> Subnet:
        """Return a preset for models of 1M weights, such as the demo's."""
        return cls(ratio=0.02, learning_rate=3.0, epochs=20)

    def _train(self, task: ForgetTask) -> Trained:
        return self._masking()._train(task)

    def _masking(self) -> BalancedSubnet:
        return BalancedSubnet(clean_weight=0.0, **asdict(self))
