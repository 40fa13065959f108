"""Durable: zero the weights with the largest gradients on memorized text, in one step.

A baseline of Sakarvadia et al., ICLR 2025, arXiv 2410.02159; first of Zhang et al., "Neurotoxin:
Durable Backdoors in Federated Learning", 2022.
"""

from __future__ import annotations

from dataclasses import dataclass

from curvfast.baselines.baseline import ForgetTask, Supervised, Trained
from curvfast.baselines.checks import check_ratio, check_reading, dropped
from curvfast.baselines.examples import in_order
from curvfast.baselines.parametrizations import without_smallest
from curvfast.baselines.training import Term, gradients, mean_loss
from curvfast.model.forward import frozen


@dataclass(frozen=True)
class Durable(Supervised):
    """Zeroes the share ``ratio`` of each matrix where |∂ CE(memorized) / ∂W| is largest.

    Exactly round(ratio · weights) of each layer become zero; nothing is random.
    """

    ratio: float = 0.01
    """Share of each matrix's weights that is zeroed, in (0, 1)."""
    batch_size: int = 64
    """Rows at a time; gradients are accumulated."""
    scored: str = "all"
    """Which tokens of a memorized passage count: ``"all"``, or ``"suffix"``."""

    def __post_init__(self) -> None:
        """Check the hyper-parameters."""
        check_ratio(self.ratio)
        check_reading(self.batch_size, self.scored)

    @classmethod
    def for_small_models(cls) -> Durable:
        """Return a preset for models of 1M weights, such as the demo's."""
        return cls(ratio=0.035)

    def _train(self, task: ForgetTask) -> Trained:
        weights = task.subject.weights()
        counts = dropped(self.ratio, weights)
        everything = len(task.memorized)
        terms = [
            Term(batch, len(batch.rows) / everything, mean_loss)
            for batch in in_order(task.memorized, self.batch_size)
        ]
        with frozen(task.subject.model, False):
            found, losses = gradients(task.subject, weights, terms)
        loss = sum(t.coefficient * value for t, value in zip(terms, losses, strict=True))
        new = {
            name: without_smallest(weight, -found[name].abs(), counts[name])
            for name, weight in weights.items()
        }
        return Trained(task.subject.commit(new), ((loss,), ()))
