"""Gradient ascent on memorized text, and descent on ordinary text to hold the rest in place.

Ascent: Jang et al., "Knowledge Unlearning for Mitigating Privacy Risks in Language Models", arXiv
2210.01504. With descent, as "gradient difference": Maini et al., "TOFU", arXiv 2401.06121.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from curvfast.baselines.checks import check_reading, check_training
from curvfast.baselines.descent import descend
from curvfast.baselines.draws import balanced_steps
from curvfast.baselines.fine_tuning import FreeWeights
from curvfast.baselines.report import ForgetReport
from curvfast.baselines.rival import begin, finish
from curvfast.layers import LayerSpec


@dataclass(frozen=True)
class GradientAscent:
    """Fine-tunes by −CE(memorized) + retain · CE(clean); the first has no lower bound.

    The defaults are TOFU's, for models of 7B parameters, all of which it fine-tunes:
    ``layers="all"`` comes closest. There is nothing it converges to: what it gives depends on when
    it stops, which must be chosen for each model.
    """

    retain: float = 1.0
    """Coefficient of the loss on clean text; 0 is ascent alone, and needs none."""
    learning_rate: float = 1e-5
    """Of AdamW."""
    weight_decay: float = 0.01
    epochs: int = 5
    """Times that every memorized row is seen."""
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

    def forget(
        self,
        model: nn.Module,
        memorized: Any,
        clean: Any = None,
        layers: LayerSpec = "mlp",
        *,
        seed: int = 0,
        progress: bool = True,
    ) -> ForgetReport:
        """Fine-tune a copy of the weights and write it, as :class:`~.rival.Rival` says.

        Args:
            model: As there.
            memorized: As there.
            clean: As there; not needed if ``retain`` is 0.
            layers: As there.
            seed: As there.
            progress: As there.

        Returns:
            What changed, and the losses on the way.
        """
        balanced = self.retain > 0
        task = begin(model, memorized, clean, layers, scored=self.scored, balanced=balanced)
        form = FreeWeights(
            task.subject, learning_rate=self.learning_rate, weight_decay=self.weight_decay
        )
        steps = balanced_steps(task, self.batch_size, seed, forget=-1.0, keep=self.retain)
        count = self.epochs * -(-len(task.memorized) // self.batch_size)
        losses = descend(task.subject, form, steps, count, progress=progress)
        return finish(self, asdict(self), task, form.weights(), losses)
