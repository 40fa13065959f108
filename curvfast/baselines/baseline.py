"""Baseline: the base class of all baselines, the weights it may change, and its report."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.baselines.examples import Example, read_examples
from curvfast.display import aligned
from curvfast.distributed import is_sharded_model
from curvfast.editing.plan import relative_change
from curvfast.errors import InputError, NonFiniteError
from curvfast.model.families import LinearLayer
from curvfast.model.identity import unwrap
from curvfast.model.layers import LayerSpec, select


@dataclass(frozen=True, eq=False)
class ForgetModel:
    """An unwrapped model, and its layers that may change."""

    model: nn.Module
    layers: Mapping[str, LinearLayer]

    @property
    def device(self) -> torch.device:
        """Device of the model's inputs."""
        return next(self.model.parameters()).device

    def weights(self) -> dict[str, Tensor]:
        """Return each layer's weight as it is stored: views without gradient."""
        return {name: layer.stored() for name, layer in self.layers.items()}

    def commit(self, new: Mapping[str, Tensor]) -> tuple[LayerChange, ...]:
        """Write weights, given in their stored shapes, as :meth:`rewrite` does.

        Returns:
            What changed, layer by layer.

        Raises:
            NonFiniteError: If a new weight is NaN or infinite; none is written then.
        """
        for name, weight in new.items():
            if not bool(torch.isfinite(weight).all()):
                raise NonFiniteError(
                    f"layer {name!r} would get weights that are NaN or infinite, so none was "
                    "written; lower the learning rate or the number of epochs"
                )

        def write() -> None:
            for name, weight in new.items():
                self.layers[name].stored().copy_(weight)

        return self.rewrite(write)

    def rewrite(self, write: Callable[[], object]) -> tuple[LayerChange, ...]:
        """Call ``write``; if it raises, restore all weights, bit for bit.

        Returns:
            The changes, layer by layer.
        """
        before = {name: weight.clone() for name, weight in self.weights().items()}
        try:
            write()
            return tuple(
                _change(name, before[name], after) for name, after in self.weights().items()
            )
        except BaseException:
            for name, weight in self.weights().items():
                weight.copy_(before[name])
            raise


def choose(model: nn.Module, layers: LayerSpec) -> ForgetModel:
    """Return the model and the layers that match ``layers``, after checking that all are writable.

    Args:
        model: Any module.
        layers: Which linear layers, as in :func:`curvfast.collect`.

    Raises:
        LayerNotFound: If nothing matches.
        InputError: If a weight is quantised or sharded.
    """
    if is_sharded_model(model):
        raise InputError(
            "the model's weights are sharded over processes; pass it whole: before fully_shard, "
            "or from its gathered checkpoint"
        )
    chosen = select(model, layers)
    for layer in chosen.values():
        layer.require_writable()
    return ForgetModel(unwrap(model), chosen)


def wide(tensor: Tensor) -> torch.dtype:
    """Return the working dtype for ``tensor``: float32, or float64 if it is."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _change(name: str, before: Tensor, after: Tensor) -> LayerChange:
    different = before != after
    zeroed = different & (after == 0)
    return LayerChange(
        name,
        weights=before.numel(),
        changed=int(different.sum()) / before.numel(),
        zeroed=int(zeroed.sum()) / before.numel(),
        relative_change=relative_change(before, after.to(wide(after))),
    )


@dataclass(frozen=True)
class LayerChange:
    """The change of one layer's weight."""

    name: str
    weights: int
    """Its number of weights."""
    changed: float
    """Share of them that were changed."""
    zeroed: float
    """Share of them that were set to zero."""
    relative_change: float
    """‖W' − W‖ / ‖W‖ in Frobenius norm."""


@dataclass(frozen=True)
class ForgetReport:
    """Report of a baseline's ``forget``, layer by layer; prints as a table."""

    method: str
    """Class name of the baseline."""
    settings: Mapping[str, Any]
    """Its hyper-parameters, JSON-able."""
    layers: tuple[LayerChange, ...]
    seconds: float
    """Duration of the call."""
    memorized_loss: tuple[float, ...] = ()
    """Before each step: per-sample mean cross-entropy on that step's memorized rows, in nats."""
    clean_loss: tuple[float, ...] = ()
    """The same on its clean rows; empty where the method reads none."""

    @property
    def changed(self) -> float:
        """Share of all weights of these layers that were changed."""
        return self._share("changed")

    @property
    def zeroed(self) -> float:
        """Share of all weights of these layers that were set to zero."""
        return self._share("zeroed")

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        return {
            "method": self.method,
            "settings": dict(self.settings),
            "changed": self.changed,
            "zeroed": self.zeroed,
            "seconds": self.seconds,
            "memorized_loss": list(self.memorized_loss),
            "clean_loss": list(self.clean_loss),
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        """Return the report as an aligned table."""
        head = ["layer", "weights", "changed %", "zeroed %", "change %"]
        rows = [
            [
                c.name, str(c.weights), f"{100 * c.changed:.3f}", f"{100 * c.zeroed:.3f}",
                f"{100 * c.relative_change:.2f}",
            ]
            for c in self.layers
        ]  # fmt: skip
        return f"{aligned([head, *rows])}\n{self.method}: {self.seconds:.3f} seconds"

    def _share(self, what: str) -> float:
        total = sum(layer.weights for layer in self.layers)
        return float(sum(getattr(c, what) * c.weights for c in self.layers) / max(1, total))


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
