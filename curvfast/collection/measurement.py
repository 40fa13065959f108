"""Measurement: hooks on a model, the batch of each call, and the unit of its loss.

Subclasses bring the sums that its calls are added to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from curvfast import distributed
from curvfast.collection.config import CollectConfig
from curvfast.collection.coverage import (
    Counted,
    Coverage,
    describe,
    require_cuda,
    require_rows,
    unrouted,
    warn_unrouted,
)
from curvfast.collection.hooks import Arrival, Calls, Capture, SharedInput
from curvfast.collection.loss_scale import OwnLosses
from curvfast.errors import InputError
from curvfast.model.batch import Batch, Routed, read_call
from curvfast.model.families import LinearLayer, outside_graphs
from curvfast.model.forward import forward_of
from curvfast.model.identity import is_causal_lm, model_facts
from curvfast.model.rows import RowRule, Thinning, nothing


class Measurement:
    """Base class of measurements: inputs and gradients of linear layers, from a running model."""

    _sums: Any
    """The interface of sums, whose state can be saved and restored."""
    _bytes: int
    """An upper bound for the bytes of all sums."""

    def __init__(
        self,
        model: nn.Module,
        config: CollectConfig,
        layers: dict[str, LinearLayer],
        *,
        rows: RowRule | None,
        grad_scaler: torch.amp.GradScaler | None,
        driven: bool,
        group: distributed.Group,
        one_of_many: bool,
        facts: Mapping[str, Any] | None,
        parts: Sequence[Any],
        inputs_first: bool,
    ) -> None:
        """Register the hooks; :func:`curvfast.collect` describes the arguments.

        With ``one_of_many``, other passes measure other layers: here there may be no rows at all.
        Batches are added to ``parts`` of the sums in turn, each of which adds an :class:`Arrival`;
        with ``inputs_first`` the inputs of a driven pass are added before, in its forward.
        """
        self._model = model
        self._config = config
        self._rule = rows
        self._grad_scaler = grad_scaler
        self._one_of_many = one_of_many
        self._facts = dict(facts or {})
        self._parts = parts
        if config.streams == "overlap":
            require_cuda(model)
        part = config.rows_per_step
        self._skip_last = is_causal_lm(model) if config.skip_last is None else config.skip_last
        self._layers = layers
        self._group, self._ranks = group, distributed.rank_and_size(group)[1]
        self._draws = torch.Generator().manual_seed(config.seed)
        self._thin = None if part is None else Thinning(part, self._draws).thin
        self._calls = self._counted = 0
        self._skipped = dict.fromkeys(self._layers, 0)
        self._next = self._new_batch()
        self._forward: Batch | None = None
        self._backward: Batch | None = None
        self._arguments = forward_of(model)
        self._active = True
        self._losses = OwnLosses()
        # A step that GradScaler skips must be left out layer by layer, so no A is shared then.
        share = config.share_inputs and grad_scaler is None
        self._capture = Capture(
            self._layers, self._current_batch, self._add, self._add_input if inputs_first else None,
            share_inputs=share, driven=driven,
        )  # fmt: skip
        self._handles: list[RemovableHandle] = []
        self.resume()

    def mask(self, mask: Tensor) -> None:
        """Set which positions of the *next* call of the model are real.

        Args:
            mask: Bool or 0/1, [sequences, length]. Overrides ``attention_mask``.

        Raises:
            InputError: If it is not two-dimensional.
        """
        if mask.dim() != 2:
            raise InputError(f"mask must be [sequences, length], got {list(mask.shape)}")
        self._next.mask = mask.detach().bool()

    def labels(self, n: int) -> None:
        """Set the number of labels over which the mean loss of the *next* call averages.

        Args:
            n: Number of labels, at least 1.

        Raises:
            InputError: If ``n`` is less than 1.
        """
        if n < 1:
            raise InputError(f"a mean loss is averaged over at least one label, got {n}")
        self._next.labels = int(n)

    def skip_next(self) -> None:
        """Let the *next* call of the model run as if it counted, and count none of its rows."""
        self._next.thin = nothing

    def resume(self) -> None:
        """Register the hooks again that :meth:`pause` removed."""
        before = outside_graphs(self._before_forward)
        after = outside_graphs(self._after_forward)
        self._capture.attach()
        self._handles = [
            self._model.register_forward_pre_hook(before, with_kwargs=True),
            self._model.register_forward_hook(after, always_call=True),
        ]

    def pause(self) -> None:
        """Remove every hook until :meth:`resume`; the sums stay."""
        self._capture.remove()
        for handle in self._handles:
            handle.remove()
        self._forward = self._backward = None

    def mean_loss(self) -> float | None:
        """Return the mean loss per label of what was counted, where ``loss_scale`` is None."""
        return self._losses.mean()

    def coverage(self) -> Coverage:
        """Return which parameters are covered, by how many rows, and why the others are not."""
        rows = {name: self._sums.rows(name)[1] for name in self._layers}
        idle = unrouted(self._layers, self._sums, self._capture.calls, self._skipped)
        return describe(self._model, self._layers, rows, idle, self._bytes)

    def add_facts(self, **facts: Any) -> None:
        """Note further provenance to be kept with the result."""
        self._facts |= facts

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what :meth:`restore` needs to go on from here: JSON-able facts, and tensors."""
        facts, tensors = self._sums.state()
        calls = {name: asdict(calls) for name, calls in self._capture.calls.items()}
        counts = {"calls": self._calls, "counted": self._counted, "layers": calls}
        return {"sums": facts, **counts}, {**tensors, "draws": self._draws.get_state()}

    def restore(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go back to a state of the same layers and configuration."""
        self._sums.restore(facts["sums"], tensors)
        self._calls, self._counted = facts["calls"], facts["counted"]
        self._draws.set_state(tensors["draws"])
        for name, calls in facts["layers"].items():
            self._capture.calls[name] = Calls(**calls)

    def close(self) -> None:
        """Remove every hook permanently; the sums stay."""
        self._active = False
        self.pause()
        self._capture.forget()

    def _added_up(self, *, final: bool) -> Any:
        """Return the sums of all ranks; in place once no more will come."""
        if self._group is None:
            return self._sums
        sums = self._sums if final else self._sums.copy()
        sums.add_up(self._group)
        if final:
            self._group = None
        return sums

    def _require(self, sums: Counted) -> list[str]:
        """Make sure that every layer that must have rows has; return the experts without any."""
        idle = unrouted(self._layers, sums, self._capture.calls, self._skipped)
        required: Iterable[str] = [name for name in self._layers if name not in idle]
        if not required and not self._one_of_many:
            required = self._layers
        require_rows(required, sums, self._capture.calls, self._skipped)
        warn_unrouted(idle)
        return idle

    def _provenance(self, idle: list[str]) -> dict[str, Any]:
        return {
            "model": model_facts(self._model),
            "collect": {**self._config.to_dict(), "skip_last": self._skip_last},
            **self._facts,
            "ranks": self._ranks,
            "coverage": self.coverage().to_dict(),
            "unrouted": idle,
        }

    def _new_batch(self) -> Batch:
        return Batch(skip_last=self._skip_last, rule=self._rule, thin=self._thin)

    def _before_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._forward, self._next = self._next, self._new_batch()
        if not torch.is_grad_enabled():
            # An evaluation between steps: it counts nothing, and is not counted.
            return
        self._forward.idle = self._calls % self._config.every != 0
        self._calls += 1
        if self._forward.idle:
            return
        self._forward.half = self._counted % len(self._parts)
        self._counted += self._forward.thin is not nothing
        read_call(self._forward, self._arguments.bind(args, kwargs))

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self._capture.flush()
        batch, self._forward = self._forward, None
        if batch is None:
            return
        if self._config.loss_scale is None and not batch.idle:
            self._losses.watch(batch, output)
        for tensor in _tensors(output):
            if tensor.dim() and batch.predictions is None:
                batch.predictions = tensor.shape[:-1]
            if tensor.requires_grad:
                # Tells a re-entrant recomputation, in the backward, which batch it belongs to.
                tensor.register_hook(partial(self._enter_backward, batch))

    def _enter_backward(self, batch: Batch, _: Tensor) -> None:
        self._backward = batch

    def _current_batch(self) -> Batch:
        return self._forward or self._backward or self._next

    def _add(self, arrival: Arrival) -> None:
        overflowed = self._grad_scaler is not None and not torch.isfinite(arrival.g).all()
        batch = arrival.batch.batch if isinstance(arrival.batch, Routed) else arrival.batch
        unit = math.inf if overflowed else self._unit(batch)
        if not math.isfinite(unit):
            self._skipped[arrival.layer] += 1
            return
        self._parts[batch.half].add(arrival, unit)

    def _add_input(self, name: str, batch: Batch | Routed, shared: SharedInput, x: Tensor) -> None:
        self._parts[batch.half].add_input(name, batch, shared, x)

    def _unit(self, batch: Batch) -> float:
        """Return what a gradient is multiplied by to be of the summed loss."""
        mean = self._config.loss_reduction == "mean"
        if self._config.loss_scale is None:
            return self._losses.unit(batch, mean=mean)
        unit = 1.0 / self._config.loss_scale
        if self._grad_scaler is not None:
            unit /= self._grad_scaler.get_scale()
        return unit * batch.label_count() if mean else unit


def _tensors(output: Any) -> list[Tensor]:
    """Return the tensors of a model's output, its logits or prediction first."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        first = [output["logits"]] if isinstance(output.get("logits"), Tensor) else []
        return first + [v for v in output.values() if isinstance(v, Tensor)]
    if isinstance(output, list | tuple):
        return [v for v in output if isinstance(v, Tensor)]
    return []
