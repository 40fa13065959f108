"""Measurement: hooks on a model, the batch of each call, and the unit of its loss.

Subclasses bring the sums that its calls are added to.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from curvfast import distributed
from curvfast.collection.batches import Batches, Rules
from curvfast.collection.causality import Causality
from curvfast.collection.config import CollectConfig
from curvfast.collection.coverage import Coverage, Skipped, describe
from curvfast.collection.hooks import Arrival, Calls, Capture, SharedInput
from curvfast.collection.loss_watch import LossWatch
from curvfast.collection.outputs import differentiable
from curvfast.collection.proofs import Proofs, from_json, to_json, together
from curvfast.collection.refusal import OnError, Refusals
from curvfast.collection.scaled_steps import ScaledSteps
from curvfast.collection.uncovered import (
    Counted,
    never_called,
    require_called,
    require_cuda,
    require_rows,
    tell_uncalled,
    unrouted,
    warn_unrouted,
)
from curvfast.collection.verdict import Energy, Verdict, judge, require_finite, require_known
from curvfast.errors import CoverageError, EvidenceWarning, InputError, StorageError
from curvfast.kfac.evidence import Evidence
from curvfast.kfac.factors import Factors
from curvfast.kfac.known import Known
from curvfast.model.call import Call
from curvfast.model.counted import CallRows
from curvfast.model.families import LinearLayer, Removable
from curvfast.model.identity import causal_convention, model_facts
from curvfast.model.rows import IGNORED_LABEL, RowRule, Thinning, nothing
from curvfast.model.token_streams import TokenStreams


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
        by_kind: bool = False,
        on_error: OnError | None = None,
    ) -> None:
        """Register the hooks; :func:`curvfast.collect` describes the arguments.

        With ``one_of_many``, other passes measure other layers: here there may be no rows at all.
        Batches are added to ``parts`` of the sums in turn, each of which adds an :class:`Arrival`;
        with ``inputs_first`` the inputs of a driven pass are added before, in its forward. Layers
        chosen ``by_kind`` are left out if the model never calls them. With ``on_error`` a refusal
        inside a hook ends the measurement, not the loop.
        """
        self._model = model
        self._config = config
        self._driven = driven
        self._one_of_many, self._by_kind = one_of_many, by_kind
        self._facts = dict(facts or {})
        self._parts = parts
        if config.streams == "overlap":
            require_cuda(model)
        part = config.rows_per_step
        self._layers = dict(layers)
        self._group, self._ranks = group, distributed.rank_and_size(group)[1]
        self._draws = torch.Generator().manual_seed(config.seed)
        self._skipped = dict.fromkeys(self._layers, 0)
        causality = Causality.of(config.skip_last, causal_convention(model))
        self._proofs = Proofs(model, causality, driven=driven)
        self._warned: set[str] = set()
        self._told_uncalled = driven
        thin = None if part is None else Thinning(part, self._draws).thin
        rules = Rules(rows, thin, config.every, len(parts), driven)
        self._batches = Batches(model, rules, self._proofs)
        self._active = True
        self._refusals = Refusals(on_error)
        run = self._refusals.run
        self._streams = TokenStreams(
            model, layers.values(), partial(run, self._opened, aside=None),
            partial(run, self._closed, aside=None),
        )  # fmt: skip
        self._steps = None if grad_scaler is None else ScaledSteps(grad_scaler, self._sums)
        self._capture = Capture(
            self._layers, self._batches.of_layer, self._streams.current, self._add,
            self._add_input if inputs_first else None, share_inputs=config.share_inputs,
            driven=driven, refusals=self._refusals,
        )  # fmt: skip
        self._loss = LossWatch(
            config, self._proofs, self._batches, self._streams, self._steps, self._refusals
        )
        self._handles: list[Removable] = []
        self.resume()

    def mask(self, mask: Tensor) -> None:
        """Set which positions of the *next* batch are real, and of no other.

        Args:
            mask: Bool or 0/1, [sequences, length]. Overrides ``attention_mask``.

        Raises:
            InputError: If it is not two-dimensional.
        """
        if mask.dim() != 2:
            raise InputError(f"mask must be [sequences, length], got {list(mask.shape)}")
        self._batches.tell(mask=mask.detach().bool())

    def labels(self, n: int) -> None:
        """Set the number of labels over which the mean loss of the *next* batch averages.

        Args:
            n: Number of labels, at least 1.

        Raises:
            InputError: If ``n`` is less than 1.
        """
        if n < 1:
            raise InputError(f"a mean loss is averaged over at least one label, got {n}")
        self._batches.tell(labels=int(n))

    def skip_next(self) -> None:
        """Let the *next* batch run as if it counted, and count none of its rows."""
        self._batches.tell(thin=nothing)

    def expect(self, targets: Tensor | None, *, backwards: bool) -> None:
        """Note what a driven pass knows of the *next* batch before its forward.

        Args:
            targets: int64, -100 at predictions without a label; None where nothing says.
            backwards: Whether several backwards run through it, each a part of the exact Fisher.
        """
        scored = None if targets is None else targets != IGNORED_LABEL
        self._batches.tell(scored=scored, several=backwards)

    def set_causal(self, causal: bool, known: Known) -> None:
        """Set whether position t predicts the token at t + 1, and who says so."""
        self._proofs.causality = Causality(causal, known.by, known.how)
        self._facts["causal"] = known.to_dict()

    def after_first_batch(self, *, by_kind: bool) -> None:
        """Tell of chosen layers that the first batch never called, and leave them out.

        Args:
            by_kind: Whether layers were chosen by kind, and not by name.

        Raises:
            CoverageError: If one that was named was not called, or none was.
        """
        if uncalled := never_called(self._layers, self._capture.calls):
            others = self._one_of_many or len(uncalled) < len(self._layers)
            require_called(uncalled, by_kind=by_kind and others)
            self._leave_out(uncalled)

    def _leave_out(self, uncalled: list[str]) -> None:
        """Leave layers out for good; one that is called later would count a part of its rows."""
        for name in uncalled:
            del self._layers[name]
        self._facts["never_called"] = uncalled
        self.pause()
        self.resume()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing that runs inside the block: no forward, and no gradient of any forward.

        For a second backward through a graph, such as of a Hessian-vector product or a gradient
        penalty, and for calls of the model that are not of the loop.
        """
        before = self._batches.deaf
        self._batches.deaf = self._capture.deaf = True
        try:
            yield
        finally:
            self._batches.deaf = self._capture.deaf = before

    def resume(self) -> None:
        """Register the hooks again that :meth:`pause` removed."""
        # First the calls around layers, so that a layer that is the model itself is inside one.
        self._streams.attach()
        self._capture.attach()
        if not self._driven:
            self._handles += self._loss.attach(self._model)

    def pause(self) -> None:
        """Remove every hook until :meth:`resume`; the sums stay."""
        self._capture.remove()
        self._streams.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._batches.forget()

    def mean_loss(self) -> float | None:
        """Return the mean loss per label of what was counted, where the model returns its loss."""
        return self._loss.mean.value()

    def coverage(self) -> Coverage:
        """Return which parameters are covered, by how many rows, and why the others are not."""
        self._decide()
        rows = {name: self._sums.rows(name)[1] for name in self._layers}
        idle = unrouted(self._layers, self._sums, self._capture.calls, self._skipped)
        facts = self._proofs.facts()
        known = judge(facts, {}, driven=self._driven)
        skipped = {name: bad for name in self._layers if (bad := facts.bad_of(name))}
        return describe(
            self._model, self._layers, rows, idle, self._bytes,
            uncalled=self._facts.get("never_called", ()),
            skipped={name: Skipped(len(bad), bad[:8]) for name, bad in skipped.items()},
            evidence=Evidence(known.unit if facts.units else None, known.rows),
        )  # fmt: skip

    def halves(self) -> tuple[Factors, Factors]:
        """Return the factors of each half of the batches, of a measurement that keeps them."""
        raise NotImplementedError

    def add_facts(self, **facts: Any) -> None:
        """Note further provenance to be kept with the result."""
        self._facts |= facts

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what :meth:`restore` needs to go on from here: JSON-able facts, and tensors."""
        self._decide()
        facts, tensors = self._sums.state()
        calls = {name: asdict(calls) for name, calls in self._capture.calls.items()}
        counts = {"calls": self._batches.calls, "counted": self._batches.counted, "layers": calls}
        counts["proofs"] = to_json(self._proofs.facts())
        counts["causality"] = asdict(self._proofs.causality)
        counts["facts"] = {key: self._facts[key] for key in ("causal",) if key in self._facts}
        counts["never_called"] = self._facts.get("never_called", [])
        return {"sums": facts, **counts}, {**tensors, "draws": self._draws.get_state()}

    def restore(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go back to a state of the same layers and configuration.

        Raises:
            StorageError: If it does not tell how its rows and unit were known.
        """
        if "proofs" not in facts:
            raise StorageError(
                "the checkpoint is of a version that did not note how rows and unit were known, "
                "and what is not known is not mixed with what is. Pass another folder, or remove "
                "this one, and measure anew"
            )
        self._sums.restore(facts["sums"], tensors)
        self._batches.calls, self._batches.counted = facts["calls"], facts["counted"]
        self._proofs.restore(from_json(facts["proofs"]), Causality(**facts["causality"]))
        self._facts |= facts["facts"]
        if facts["never_called"]:
            self._leave_out(facts["never_called"])
        self._draws.set_state(tensors["draws"])
        for name, calls in facts["layers"].items():
            self._capture.calls[name] = Calls(**calls)

    def close(self) -> None:
        """Remove every hook permanently; the sums stay."""
        if self._active and self._steps is not None:
            self._steps.finish()
        self._active = False
        self.pause()
        self._capture.forget()
        self._streams.forget()

    def _added_up(self, *, final: bool) -> Any:
        """Return the sums of all ranks; in place once no more will come.

        Raises:
            CurvfastError: What ended the measurement inside a hook.
        """
        self._refusals.check_all(self._group)
        self._decide()
        if self._group is None:
            return self._sums
        sums = self._sums if final else self._sums.copy()
        sums.add_up(self._group)
        if final:
            self._group = None
        return sums

    def _judged(self, energy: Callable[[str], Energy], group: distributed.Group) -> Verdict:
        """Return what the evidence of all ranks proves; all of them raise alike.

        Raises:
            EvidenceError: If rows or unit are not known.
            NonFiniteError: If something was not finite, and that is to be an error.
        """
        everywhere = distributed.gather(to_json(self._proofs.facts()), group)
        facts = together([from_json(each) for each in everywhere])
        leaking = [name for name, leak in facts.leaks.items() if leak.outside > 0]
        verdict = judge(facts, {name: energy(name) for name in leaking}, driven=self._driven)
        require_known(verdict, strict=self._config.strict)
        if self._config.on_nonfinite == "error":
            require_finite(facts)
        for message in verdict.warnings:
            if message not in self._warned:
                self._warned.add(message)
                warnings.warn(message, EvidenceWarning, stacklevel=4)
        return verdict

    def _require(self, sums: Counted) -> list[str]:
        """Make sure that every layer that must have rows has; return the experts without any."""
        idle = unrouted(self._layers, sums, self._capture.calls, self._skipped)
        required: Iterable[str] = [name for name in self._layers if name not in idle]
        if not required and not self._one_of_many:
            required = self._layers
        uncalled = require_rows(
            required, sums, self._capture.calls, self._skipped, by_kind=self._by_kind
        )
        if uncalled:
            self._facts["never_called"] = [*self._facts.get("never_called", ()), *uncalled]
        warn_unrouted(idle)
        return idle

    def _provenance(self, idle: list[str], verdict: Verdict) -> dict[str, Any]:
        return {
            "model": model_facts(self._model),
            "collect": {**self._config.to_dict(), "skip_last": self._proofs.causality.causal},
            **self._facts,
            "ranks": self._ranks,
            "coverage": self.coverage().to_dict(),
            "unrouted": idle,
            "read_only": {n: why for n, x in self._layers.items() if (why := x.why_read_only())},
            "known": verdict.to_dict(),
        }

    def _decide(self) -> None:
        """Decide whether the last step of a scaled loop counts, once that is known."""
        if self._steps is not None:
            self._steps.settle()

    def _opened(self, module: nn.Module, call: Call) -> None:
        """Begin a batch with a call of the model, or of a part of it from outside."""
        self._decide()
        if module is self._model and self._batches.counted == 1 and not self._told_uncalled:
            self._told_uncalled = True
            tell_uncalled(never_called(self._layers, self._capture.calls))
        self._batches.open(module, call)

    def _closed(self, module: nn.Module, output: Any) -> None:
        """End the forward of a batch, and watch for its gradients."""
        self._capture.flush()
        batch = self._batches.close(module, output)
        if batch is None or batch.bypassed:
            return
        if not batch.shown and not self._one_of_many and differentiable(output):
            raise CoverageError(
                f"a forward of {type(self._model).__name__} showed none of the "
                f"{len(self._layers)} chosen layers. The likely cause is torch.compile: a model "
                "compiled before collect() began runs graphs without our hooks. Enter collect() "
                "before the first compiled call, or call torch.compiler.reset() first"
            )
        if not self._driven:
            self._loss.watch(batch, output)

    def _add(self, arrival: Arrival) -> None:
        self._decide()
        batch = arrival.batch.batch
        self._loss.settle(batch, arrival.g)
        if not batch.finite:
            self._skipped[arrival.layer] += 1
        if not batch.counts:
            return
        if not self._parts[batch.half].add(arrival, batch.unit.value, batch.number):
            self._skipped[arrival.layer] += 1
            self._proofs.note_bad(batch.number, arrival.layer)
            return
        self._proofs.note_rows(arrival, batch.unit.value)
        if not self._driven and batch.rule is None:
            shape = arrival.g.shape[:-1]
            batch.streams.setdefault(arrival.batch.stream(shape), (arrival.batch, shape))

    def _add_input(self, name: str, rows: CallRows, shared: SharedInput, x: Tensor) -> None:
        if not self._parts[rows.half].add_input(name, rows, shared, x, rows.batch.number):
            self._proofs.note_bad(rows.batch.number, name)
