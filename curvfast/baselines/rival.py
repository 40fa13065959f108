"""What all rivals have in common: one call, what is checked before it, one report after it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from curvfast.baselines.examples import Example, read_examples
from curvfast.baselines.report import ForgetReport
from curvfast.baselines.subject import Subject, choose
from curvfast.layers import LayerSpec

Losses = tuple[tuple[float, ...], tuple[float, ...]]
"""Per-sample mean cross-entropies before each step: of memorized rows, of clean rows."""


class Rival(Protocol):
    """A way to make a model forget, with its hyper-parameters."""

    def forget(
        self,
        model: nn.Module,
        memorized: Any,
        clean: Any,
        layers: LayerSpec = "mlp",
        *,
        seed: int = 0,
        progress: bool = True,
    ) -> ForgetReport:
        """Change the weights of ``layers``, in place, their dtypes kept.

        Everything is checked before the first weight is written, and if the call does not return
        every weight is as it was, bit for bit. Modes, ``requires_grad``, gradients and the global
        random state are as they were in any case; dropout is off meanwhile.

        Args:
            model: A causal language model.
            memorized: What to forget: passages (with ``prefix`` and ``suffix``), sequences of token
                ids, or batches of them (tensors, or mappings with ``input_ids`` and, where there
                are, ``attention_mask`` and ``labels``), of any lengths.
            clean: Ordinary text in the same forms, finite; None where the method needs none.
            layers: Which linear layers, as in :func:`curvfast.collect`.
            seed: Seed of all that is random.
            progress: Whether a bar counts steps (on a terminal only).

        Returns:
            What changed, and the losses on the way.

        Raises:
            InputError: If text is missing or is no text, or a weight is quantised or sharded.
            LayerNotFound: If ``layers`` matches nothing.
            NonFiniteError: If a loss or a new weight is NaN or infinite.
        """


@dataclass(frozen=True, eq=False)
class Task:
    """A model and the text to work with, all of it checked."""

    subject: Subject
    memorized: tuple[Example, ...]
    clean: tuple[Example, ...]
    """Empty where the method looks at none."""
    started: float


def begin(
    model: nn.Module,
    memorized: Any,
    clean: Any,
    layers: LayerSpec,
    *,
    scored: str,
    balanced: bool,
) -> Task:
    """Check and read what a rival is given.

    Args:
        model: As in :meth:`Rival.forget`.
        memorized: As there.
        clean: As there.
        layers: As there.
        scored: Which tokens of ``memorized`` count, as in :func:`read_examples`.
        balanced: Whether ``clean`` is needed; otherwise it is not read.

    Raises:
        InputError: If text is missing or is no text, or a weight is quantised or sharded.
        LayerNotFound: If ``layers`` matches nothing.
    """
    started = time.perf_counter()
    subject = choose(model, layers)
    examples = read_examples(memorized, "memorized", scored)
    others = read_examples(clean, "clean", "all") if balanced else ()
    return Task(subject, examples, others, started)


def finish(
    rival: Rival,
    settings: Mapping[str, Any],
    task: Task,
    new: Mapping[str, Tensor],
    losses: Losses,
) -> ForgetReport:
    """Write new weights, by layer in the stored shape, all or none, and report.

    Args:
        rival: Whose they are.
        settings: Its hyper-parameters.
        task: What it worked on.
        new: The weights.
        losses: On the way.

    Raises:
        NonFiniteError: If a weight is NaN or infinite.
    """
    changes = task.subject.commit(new)
    seconds = time.perf_counter() - task.started
    return ForgetReport(type(rival).__name__, settings, changes, seconds, *losses)
