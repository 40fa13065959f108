"""Gradient ascent on memorized text, with descent on clean text to preserve other abilities.

Ascent: Jang et al., "Knowledge Unlearning for Mitigating Privacy Risks in Language Models", arXiv
2210.01504. With descent, as "gradient difference": Maini et al., "TOFU", arXiv 2401.06121.
"""

from __future__ import annotations

from dataclasses import dataclass

from curvfast.baselines.baseline import ForgetTask, Supervised, Trained
from curvfast.baselines.checks import check_reading, check_training
from curvfast.baselines.parametrizations import FreeWeights
from curvfast.baselines.training import balanced_steps, descend


@dataclass(frozen=True)
class GradientAscent(Supervised):
    """Fine-tunes by −CE(memorized) + retain · CE(clean); the first has no lower bound.

    The defaults are TOFU's, for models of 7B parameters, all of which it fine-tunes:
    ``layers="all"`` comes closest. It does not converge: the result depends on the number of steps,
    which must be chosen for each model.
    """

    retain: float = 1.0
    """Coefficient of the loss on clean text; 0 is ascent alone, and needs none."""
    learning_rate: float = 1e-5
    """Learning rate of AdamW."""
    weight_decay: float = 0.01
    epochs: int = 5
    """Passes over the memorized rows."""
    batch_size: int = 32
    """Rows of each set in a step, at most."""
    scored: str = "all"
    """Which tokens of a memorized passage count: ``"all"``, or ``"suffix"``."""

    def __post_init__(self) -> None:
        """Check the hyper-parameters."""
        check_reading(self.batch_size, self.scored)
        check_training(
            self.epochs, self.learning_rate, retain=self.retain, weight_decay=self.weight_decay
        )

    def _balanced(self) -> bool:
        return self.retain > 0

    def _train(self, task: ForgetTask) -> Trained:
        form = FreeWeights(
            task.subject, learning_rate=self.learning_rate, weight_decay=self.weight_decay
        )
        steps = balanced_steps(task, self.batch_size, task.seed, forget=-1.0, keep=self.retain)
        return descend(task, form, steps, self.epochs * -(-len(task.memorized) // self.batch_size))
