"""Negative preference optimisation (NPO): ascent that weakens as a passage is forgotten.

Zhang, Lin, Bai and Mei, "Negative Preference Optimization: From Catastrophic Collapse to Effective
Unlearning", 2024, arXiv 2404.05868, equation 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from curvfast.baselines.baseline import ForgetTask, Supervised, Trained
from curvfast.baselines.checks import check_reading, check_training
from curvfast.baselines.examples import TokenBatch, in_order
from curvfast.baselines.parametrizations import FreeWeights
from curvfast.baselines.training import balanced_steps, descend, log_likelihoods
from curvfast.errors import InputError
from curvfast.model.forward import frozen


def npo_loss(found: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Return the NPO loss −(2/β) · mean log σ(−β · (log π_θ − log π_ref)).

    As β → 0 it is (2/β) · log 2 + mean(log π_θ − log π_ref): gradient ascent on the summed loss.

    Args:
        found: log π_θ of each passage, [rows].
        reference: log π_ref of the same passages, [rows].
        beta: β > 0.
    """
    return -2 / beta * logsigmoid(-beta * (found - reference)).mean()


@dataclass(frozen=True)
class NPO(Supervised):
    """Fine-tunes by the NPO loss of memorized text + retain · CE(clean).

    π is the likelihood of a passage's suffix given its prefix, π_ref that of the model as it was.
    The defaults are the paper's on TOFU, for models of 7B parameters, all of which it fine-tunes:
    ``layers="all"`` comes closest.
    """

    beta: float = 0.1
    """β > 0: the larger, the sooner a forgotten passage is left alone."""
    retain: float = 1.0
    """Coefficient of the loss on clean text; 0 is NPO alone, and needs none."""
    learning_rate: float = 1e-5
    """Learning rate of AdamW."""
    weight_decay: float = 0.01
    epochs: int = 10
    """Passes over the memorized rows."""
    batch_size: int = 32
    """Rows of each set in a step, at most."""
    scored: str = "suffix"
    """Which tokens of a memorized passage count: ``"suffix"``, or ``"all"``."""

    def __post_init__(self) -> None:
        """Check the hyper-parameters.

        Raises:
            InputError: If one is out of range.
        """
        check_reading(self.batch_size, self.scored)
        check_training(
            self.epochs, self.learning_rate, retain=self.retain, weight_decay=self.weight_decay
        )
        if not 0 < self.beta < float("inf"):
            raise InputError(f"beta={self.beta}: pass a positive number")

    @classmethod
    def for_small_models(cls) -> NPO:
        """Return a preset for models of 1M weights, such as the demo's."""
        return cls(beta=1.0, retain=5.0, learning_rate=2e-4, epochs=20)

    def _balanced(self) -> bool:
        return self.retain > 0

    def _train(self, task: ForgetTask) -> Trained:
        reference = reference_log_likelihoods(task, self.batch_size)

        def objective(found: Tensor, batch: TokenBatch) -> Tensor:
            return npo_loss(found, reference[batch.rows].to(found.device), self.beta)

        form = FreeWeights(
            task.subject, learning_rate=self.learning_rate, weight_decay=self.weight_decay
        )
        steps = balanced_steps(
            task, self.batch_size, task.seed, forget=1.0, keep=self.retain, objective=objective
        )
        return descend(task, form, steps, self.epochs * -(-len(task.memorized) // self.batch_size))


def reference_log_likelihoods(task: ForgetTask, batch_size: int) -> Tensor:
    """Return log π_ref of every memorized row under the current model, [rows] on the CPU."""
    with torch.no_grad(), frozen(task.subject.model, False):
        parts = [
            log_likelihoods(task.subject, {}, batch).cpu()
            for batch in in_order(task.memorized, batch_size)
        ]
    return torch.cat(parts)
