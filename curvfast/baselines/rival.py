"""Baseline: the base class of all baselines, with their common ``forget``."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from curvfast.baselines.examples import Example, read_examples
from curvfast.baselines.report import ForgetReport, LayerChange
from curvfast.baselines.subject import ForgetModel, choose
from curvfast.layers import LayerSpec

Examples = tuple[Example, ...]
Losses = tuple[tuple[float, ...], tuple[float, ...]]
"""Per-sample mean cross-entropies before each step: of memorized rows, of clean rows."""


@dataclass(frozen=True, eq=False)
class ForgetTask:
    """The checked inputs of one call of ``forget``."""

    subject: ForgetModel
    memorized: Examples
    """Empty where the method reads no text."""
    clean: Examples
    """Empty where the method reads none."""
    seed: int = 0
    progress: bool = False


@dataclass(frozen=True, eq=False)
class Trained:
    """Result of a baseline's training: changes by layer, and the losses before each step."""

    changes: tuple[LayerChange, ...]
    losses: Losses = ((), ())


@dataclass(frozen=True, eq=False)
class Baseline(ABC):
    """Base class of baselines: a method of forgetting with its hyper-parameters as fields.

    A subclass implements :meth:`_train`. One that reads text inherits from :class:`Supervised`.
    """

    def forget(
        self,
        model: nn.Module,
        memorized: Any = None,
        clean: Any = None,
        layers: LayerSpec = "mlp",
        *,
        seed: int = 0,
        progress: bool = True,
    ) -> ForgetReport:
        """Make a model forget, by changing the weights of ``layers`` in place, in their dtypes.

        Everything is checked before the first weight is written, and if the call does not return
        every weight is as it was, bit for bit. Modes, ``requires_grad``, gradients and the global
        random state are restored in any case; dropout is off during the call.

        Args:
            model: A causal language model.
            memorized: What to forget: passages (with ``prefix`` and ``suffix``), sequences of token
                ids, or batches of them (tensors, or mappings with ``input_ids`` and, where there
                are, ``attention_mask`` and ``labels``), of any lengths. Read by the supervised
                methods only.
            clean: Ordinary text in the same forms, finite; read only by a method that balances
                forgetting against it, which then needs it.
            layers: Which linear layers, as in :func:`curvfast.collect`.
            seed: Seed of all that is random.
            progress: Whether a bar counts steps (on a terminal only).

        Returns:
            What changed, and the losses before each step: cross-entropies, whatever the objective.

        Raises:
            InputError: If text is missing or unreadable, or a weight is quantised or sharded.
            LayerNotFound: If ``layers`` matches nothing.
            NonFiniteError: If a loss or a new weight is NaN or infinite.
        """
        started = time.perf_counter()
        subject = choose(model, layers)
        examples, others = self._read(memorized, clean)
        trained = self._train(ForgetTask(subject, examples, others, seed, progress))
        seconds = time.perf_counter() - started
        settings = self._settings(change.name for change in trained.changes)
        return ForgetReport(
            type(self).__name__, settings, trained.changes, seconds, *trained.losses
        )

    @abstractmethod
    def _train(self, task: ForgetTask) -> Trained:
        """Find new weights and write them through ``task.subject``, all or none."""

    def _read(self, memorized: Any, clean: Any) -> tuple[Examples, Examples]:
        """Return the memorized and the clean text that the method reads: here none."""
        return (), ()

    def _settings(self, layers: Iterable[str]) -> dict[str, Any]:
        """Return the hyper-parameters, JSON-able, given the layers that were changed."""
        return asdict(self)


Rival = Baseline
"""The earlier name of :class:`Baseline`."""


class Supervised(Baseline):
    """Base class of baselines that read the memorized text."""

    scored: str
    """Which tokens of a memorized passage count: ``"all"``, or ``"suffix"``."""

    def _balanced(self) -> bool:
        """Return whether clean text is needed; otherwise it is not read."""
        return False

    def _read(self, memorized: Any, clean: Any) -> tuple[Examples, Examples]:
        examples = read_examples(memorized, "memorized", self.scored)
        return examples, read_examples(clean, "clean", "all") if self._balanced() else ()
