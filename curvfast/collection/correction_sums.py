"""Sums of the EK-FAC correction: squared products of rows rotated into the eigenbasis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from curvfast import distributed, ops
from curvfast.collection.device_flags import DeviceFlags
from curvfast.collection.hooks import Arrival, SharedInput
from curvfast.errors import CoverageError, NonFiniteError
from curvfast.kfac.corrections import SEQUENCE, LayerCorrection
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.model.batch import Batch
from curvfast.model.counted import CallRows
from curvfast.model.families import LinearLayer
from curvfast.model.rows import Rows
from curvfast.ops import devices


@dataclass
class _Running:
    """The running sum of one layer: float32, and the float64 part spilled from it."""

    sum: Tensor
    """[k_g, k_a] float32."""
    count: int = 0
    calls: int = 0
    """Calls since the last spill."""
    spilled: Tensor | None = None
    """[k_g, k_a] float64, where float32 is spilled."""
    batches: WeakSet[Batch] = field(default_factory=WeakSet)
    """Batches that were added, held weakly."""

    def spill(self) -> None:
        """Move the float32 sum into float64."""
        self.spilled = self.sum.double() if self.spilled is None else self.spilled.add_(self.sum)
        self.sum.zero_()
        self.calls = 0

    def absorb(self, other: _Running) -> None:
        """Add what another holds."""
        self.sum.add_(other.sum)
        if other.spilled is not None:
            self.spill()
            assert self.spilled is not None
            self.spilled.add_(other.spilled)
        self.count += other.count
        self.calls += other.calls

    def clear(self) -> None:
        """Empty it; its memory stays."""
        self.sum.zero_()
        if self.spilled is not None:
            self.spilled.zero_()
        self.count = self.calls = 0

    def total(self) -> Tensor:
        """Return the total in float32; if nothing was spilled, the running sum itself."""
        return self.sum if self.spilled is None else (self.spilled + self.sum).float()


@dataclass(eq=False)
class _Projected:
    """Inputs rotated into the eigenbasis, kept for the other layers that read them."""

    of: tuple[SharedInput, Rows, Any]
    rows: Tensor
    """[rows, k_a] float32."""
    readers: int
    """Number of layers that have not used them yet."""
    finite: Tensor | bool
    """Whether all are; a flag [] on an accelerator."""

    def fits(self, of: tuple[SharedInput, Rows, Any]) -> bool:
        """Return whether these are the same rows of the same input, rotated by the same vectors."""
        return all(mine is one for mine, one in zip(self.of, of, strict=True))


class CorrectionSums:
    """Sums of squared per-sample gradients of layers in their eigenbases."""

    def __init__(
        self,
        layers: dict[str, LinearLayer],
        basis: Eigenbasis,
        per: str,
        spill_every: int | None = None,
    ) -> None:
        """Create empty sums; nothing is allocated yet.

        Args:
            layers: The layers, all of them in the basis.
            basis: Their eigenbases; a layer's is read when its first rows come.
            per: What a sample is.
            spill_every: Number of calls after which float32 is added to float64; None: never.
        """
        self._layers, self._basis = layers, basis
        self._per = per
        self._spill_every = spill_every
        self._sums: dict[str, _Running] = {}
        self._vectors: dict[Any, Tensor] = {}
        self._last: _Projected | None = None
        self._flags, self._pending_flags = DeviceFlags(), DeviceFlags()
        self._pending: dict[str, _Running] | None = None

    def add(self, arrival: Arrival, unit: float, number: int = 0) -> bool:
        """Add the counted rows of one call.

        Args:
            arrival: The call.
            unit: What g is multiplied by to be the gradient of the summed loss; finite.
            number: The batch's, by which a value on an accelerator is reported when sums are read.

        Returns:
            False if an input or gradient in a counted row is not finite: then nothing was added.
            On an accelerator no one waits to know: the call adds zeros, and the sums refuse to be
            read.
        """
        name, g, x = arrival.layer, arrival.g, arrival.x
        assert x is not None
        rows = arrival.batch.rows(name, g.shape[:-1], g.device)
        if not rows.count:
            return True
        basis = self._basis[name]
        inputs = self._inputs(arrival.shared, name, rows, x)
        vectors = self._held(("g", name), lambda: basis.vectors_g, g.device)  # U: [d_out, k_g]
        p, q = ops.project_rows(rows.take(g), vectors).mul_(unit), inputs.rows  # [rows, k_g | k_a]
        finite = _finite(p)
        if isinstance(inputs.finite, Tensor) and isinstance(finite, Tensor):
            flags = self._flags if self._pending is None else self._pending_flags
            flags.note(name, "input", inputs.finite, number)
            flags.note(name, "gradient", finite, number)
            p.masked_fill_(~(inputs.finite & finite), 0.0)
        elif not (inputs.finite and finite):
            return False
        running = self._running(name, g.device)
        if self._per == SEQUENCE:
            if not arrival.again:
                self._require_first(name, running, arrival.batch)
            owners = arrival.batch.sequences(g.shape[:-1], rows, g.device)  # [rows]
            if not arrival.batch.in_order(g.shape[:-1]):
                # The rows of an expert come in any order.
                owners, order = owners.sort(stable=True)
                p, q = p[order], q[order]
            lengths = owners.unique_consecutive(return_counts=True)[1].tolist()  # [sequences]
            ops.add_by_sequence_(running.sum, p, q, lengths)
            running.count += 0 if arrival.again else len(lengths)
        else:
            ops.add_by_position_(running.sum, p, q)
            running.count += 0 if arrival.again else rows.count
        running.calls += 1
        self._spill_when_due(running)
        return True

    def begin_pending(self) -> None:
        """Keep what is added from here on apart, until it is committed or discarded.

        Whatever is read meanwhile is of what is committed.
        """
        if self._pending is None:
            self._pending = {}

    def commit(self) -> bool:
        """Add what is pending to the sums, or discard it if an accelerator says it is not finite.

        Returns:
            Whether it was added.
        """
        if self._pending_flags.bad():
            self.discard()
            return False
        self._pending_flags.clear()
        for name, pending in (self._pending or {}).items():
            running = self._committed(name, pending.sum.device)
            running.absorb(pending)
            self._spill_when_due(running)
            pending.clear()
        return True

    def discard(self) -> None:
        """Forget what is pending."""
        self._pending_flags.clear()
        for pending in (self._pending or {}).values():
            pending.clear()

    def _spill_when_due(self, running: _Running) -> None:
        if self._spill_every is not None and running.calls >= self._spill_every:
            running.spill()

    def rows(self, name: str) -> tuple[int, int]:
        """Return how many samples were summed, once for the inputs and once for the gradients."""
        count = self._sums[name].count if name in self._sums else 0
        return count, count

    def corrections(self) -> dict[str, LayerCorrection]:
        """Return the correction of every layer with rows; it may share memory with the sums.

        Raises:
            NonFiniteError: If a sum overflowed, or a call on an accelerator was not finite.
        """
        self._last = None
        self._require_finite()
        return {
            name: LayerCorrection(self._sums[name].total(), self._sums[name].count)
            for name in self._layers
            if name in self._sums and self._sums[name].count
        }

    def add_up(self, group: distributed.Group) -> None:
        """Replace every sum and count by its total over all ranks; called by all, once.

        Raises:
            DistributedError: If another rank is gone.
        """
        if group is None:
            return
        counts = torch.tensor([self.rows(name)[0] for name in self._layers], device="cpu")
        distributed.add_(counts, group)
        for name, count in zip(self._layers, counts.tolist(), strict=True):
            if not count:
                continue
            running = self._running(name, self._layers[name].parameter.device)
            running.count = count
            if self._spill_every is not None:
                running.spill()
            distributed.add_(running.sum if running.spilled is None else running.spilled, group)

    def copy(self) -> CorrectionSums:
        """Return a copy that later additions to the original do not change."""
        other = CorrectionSums(self._layers, self._basis, self._per, self._spill_every)
        # Unchecked: all ranks add up before one of them refuses.
        facts, tensors = self._snapshot()
        other.restore(facts, {key: tensor.clone() for key, tensor in tensors.items()})
        other._flags.absorb(self._flags)
        return other

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what :meth:`restore` needs: JSON-able facts, and tensors by key.

        Raises:
            NonFiniteError: As :meth:`corrections`.
        """
        self._require_finite()
        return self._snapshot()

    def _snapshot(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        facts, tensors = {}, {}
        for name, running in self._sums.items():
            facts[name] = {"count": running.count, "calls": running.calls}
            tensors[f"sum.{name}"] = running.sum
            if running.spilled is not None:
                tensors[f"spilled.{name}"] = running.spilled
        return facts, tensors

    def restore(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go back to a state."""
        self._sums.clear()
        self.discard()
        for name, entry in facts.items():
            device = self._layers[name].parameter.device
            spilled = tensors.get(f"spilled.{name}")
            self._sums[name] = _Running(
                tensors[f"sum.{name}"].to(device), entry["count"], entry["calls"],
                None if spilled is None else spilled.to(device),
            )  # fmt: skip

    def release(self) -> None:
        """Release every sum and eigenvector; the counts stay."""
        self._vectors.clear()
        self._pending = None
        for running in self._sums.values():
            running.sum, running.spilled = running.sum.new_empty(0), None

    def _running(self, name: str, device: torch.device) -> _Running:
        """Return the sum that calls are added to: the pending one, if there is one."""
        if self._pending is None:
            return self._committed(name, device)
        if name not in self._pending:
            self._pending[name] = self._empty(name, device)
        return self._pending[name]

    def _committed(self, name: str, device: torch.device) -> _Running:
        if name not in self._sums:
            self._sums[name] = self._empty(name, device)
        return self._sums[name]

    def _empty(self, name: str, device: torch.device) -> _Running:
        shape = self._basis[name].ranks
        return _Running(torch.zeros(shape, dtype=torch.float32, device=device))

    def _inputs(self, shared: SharedInput, name: str, rows: Rows, x: Tensor) -> _Projected:
        """Return the rows of an input in the eigenbasis; layers that read one project it once."""
        basis = self._basis[name]
        vectors = self._held(basis.key_a, lambda: basis.vectors_a, x.device)  # V: [d_in, k_a]
        of = (shared, rows, vectors)
        last = self._last
        if last is None or not last.fits(of):
            projected = ops.project_rows(rows.take(x), vectors)  # a V: [rows, k_a]
            last = _Projected(of, projected, len(shared.readers), _finite(projected))
            if isinstance(last.finite, Tensor):
                projected.masked_fill_(~last.finite, 0.0)
        last.readers -= 1
        self._last = last if last.readers else None
        return last

    def _held(self, key: Any, read: Callable[[], Tensor], device: torch.device) -> Tensor:
        """Return eigenvectors on ``device``, read once."""
        if (key, device) not in self._vectors:
            self._vectors[key, device] = read().to(device, torch.float32)
        return self._vectors[key, device]

    def _require_finite(self) -> None:
        self._flags.require_finite()
        for name, running in self._sums.items():
            if running.sum.numel() and not ops.all_finite(running.total()):
                raise NonFiniteError(
                    f"the correction of {name!r} overflowed float32: its gradients are finite and "
                    "their squares are not. The likely cause is a step that diverged, or a loss "
                    "scale that was not divided out; leave out the batch, or pass loss_scale="
                )

    @staticmethod
    def _require_first(name: str, running: _Running, batch: CallRows) -> None:
        whole = batch.batch
        if whole in running.batches:
            raise CoverageError(
                f"layer {name!r} was called twice in one call of the model, so the gradient of a "
                "sequence is a sum over both; measure with per='position', or leave the layer out"
            )
        running.batches.add(whole)


def _finite(rows: Tensor) -> Tensor | bool:
    """Return whether rows [n, k] are finite, and on an accelerator a flag [] of it."""
    return ops.finite_flag(rows) if devices.on_accelerator(rows.device) else ops.all_finite(rows)


def bytes_of(basis: Eigenbasis) -> int:
    """Return the bytes of the float32 sums of all layers of a basis."""
    return sum(4 * basis[name].ranks[0] * basis[name].ranks[1] for name in basis)
