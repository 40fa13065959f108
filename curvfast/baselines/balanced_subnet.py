"""BalancedSubnet, and Subnet on memorized text alone: masks of weights to drop.

Sakarvadia et al., "Mitigating Memorization in Language Models", ICLR 2025, arXiv 2410.02159.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from curvfast.baselines.baseline import ForgetTask, Supervised, Trained
from curvfast.baselines.checks import (
    check_clean_weight,
    check_ratio,
    check_reading,
    check_training,
    dropped,
)
from curvfast.baselines.parametrizations import MaskedWeights
from curvfast.baselines.training import balanced_steps, descend, generators


@dataclass(frozen=True)
class BalancedSubnet(Supervised):
    """Drops the weights of smallest learnt |score|; loss −(1 − w) · CE(memorized) + w · CE(clean).

    The defaults are those of the paper's code, which tunes the ratio for each model. The paper
    masks the up and down projections of every MLP: ``layers=["*.up_proj", "*.down_proj"]`` where
    there is a gate too.

    Exactly round(ratio · weights) of each layer become zero; all others stay, bit for bit.
    """

    ratio: float = 0.01
    """Share of each matrix's weights that is dropped, in (0, 1)."""
    clean_weight: float = 0.05
    """w, in [0, 1); 0 is Subnet, and reads no clean text."""
    learning_rate: float = 0.1
    """Learning rate of SGD on the scores."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    epochs: int = 5
    """Passes over the larger set."""
    batch_size: int = 32
    """Rows of each set in a step, at most: the paper draws 64 of both together."""
    scored: str = "all"
    """Which tokens of a memorized passage count: ``"all"``, or ``"suffix"``."""

    def __post_init__(self) -> None:
        """Check the hyper-parameters."""
        check_ratio(self.ratio)
        check_clean_weight(self.clean_weight)
        check_reading(self.batch_size, self.scored)
        check_training(
            self.epochs, self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
        )

    @classmethod
    def original(cls) -> BalancedSubnet:
        """Return the preset of the paper's code."""
        return cls()

    @classmethod
    def kfac_paper(cls) -> BalancedSubnet:
        """Return the preset of the comparison in arXiv 2510.24256, on OLMo-2-7B."""
        return cls(ratio=0.0015, clean_weight=0.7, learning_rate=0.3)

    @classmethod
    def for_small_models(cls) -> BalancedSubnet:
        """Return a preset for models of 1M weights, such as the demo's."""
        return cls(ratio=0.02, clean_weight=0.5, learning_rate=3.0, epochs=10)

    def _balanced(self) -> bool:
        return self.clean_weight > 0

    def _train(self, task: ForgetTask) -> Trained:
        form = MaskedWeights(
            task.subject,
            dropped(self.ratio, task.subject.weights()),
            generators(task.seed)[0],
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )
        steps = balanced_steps(
            task, self.batch_size, task.seed, forget=self.clean_weight - 1, keep=self.clean_weight
        )
        rounds = -(-max(len(task.memorized), len(task.clean)) // self.batch_size)
        return descend(task, form, steps, self.epochs * rounds)


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
