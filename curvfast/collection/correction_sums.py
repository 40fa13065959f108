"""Sums of the EK-FAC correction: squared products of rows rotated into the eigenbasis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from curvfast import distributed, ops
from curvfast.collection.hooks import Arrival, SharedInput
from curvfast.errors import CoverageError
from curvfast.kfac.corrections import SEQUENCE, LayerCorrection
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.model.batch import Batch, Routed
from curvfast.model.families import LinearLayer
from curvfast.model.rows import Rows


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

    def add(self, arrival: Arrival, unit: float) -> None:
        """Add the counted rows of one call; ``unit`` scales g to that of the summed loss."""
        name, g, x = arrival.layer, arrival.g, arrival.x
        assert x is not None
        rows = arrival.batch.rows(name, g.shape[:-1], g.device)
        if not rows.count:
            return
        basis = self._basis[name]
        q = self._inputs(arrival.shared, name, rows, x)  # a V: [rows, k_a]
        vectors = self._held(("g", name), lambda: basis.vectors_g, g.device)  # U: [d_out, k_g]
        p = ops.project_rows(rows.take(g), vectors).mul_(unit)  # g U: [rows, k_g]
        running = self._running(name, g.device)
        if self._per == SEQUENCE:
            self._require_first(name, running, arrival.batch)
            owners = arrival.batch.sequences(g.shape[:-1], rows, g.device)  # [rows]
            if isinstance(arrival.batch, Routed):
                # The rows of an expert come in any order.
                owners, order = owners.sort(stable=True)
                p, q = p[order], q[order]
            lengths = owners.unique_consecutive(return_counts=True)[1].tolist()  # [sequences]
            ops.add_by_sequence_(running.sum, p, q, lengths)
            running.count += len(lengths)
        else:
            ops.add_by_position_(running.sum, p, q)
            running.count += rows.count
        running.calls += 1
        if self._spill_every is not None and running.calls >= self._spill_every:
            running.spill()

    def rows(self, name: str) -> tuple[int, int]:
        """Return how many samples were summed, once for the inputs and once for the gradients."""
        count = self._sums[name].count if name in self._sums else 0
        return count, count

    def corrections(self) -> dict[str, LayerCorrection]:
        """Return the correction of every layer with rows; it may share memory with the sums."""
        self._last = None
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
        facts, tensors = self.state()
        other.restore(facts, {key: tensor.clone() for key, tensor in tensors.items()})
        return other

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what :meth:`restore` needs: JSON-able facts, and tensors by key."""
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
        for running in self._sums.values():
            running.sum, running.spilled = running.sum.new_empty(0), None

    def _running(self, name: str, device: torch.device) -> _Running:
        if name not in self._sums:
            self._sums[name] = _Running(
                torch.zeros(self._basis[name].ranks, dtype=torch.float32, device=device)
            )
        return self._sums[name]

    def _inputs(self, shared: SharedInput, name: str, rows: Rows, x: Tensor) -> Tensor:
        """Return the rows of an input in the eigenbasis; layers that read one project it once."""
        basis = self._basis[name]
        vectors = self._held(basis.key_a, lambda: basis.vectors_a, x.device)  # V: [d_in, k_a]
        of = (shared, rows, vectors)
        last = self._last
        if last is None or not last.fits(of):
            last = _Projected(of, ops.project_rows(rows.take(x), vectors), len(shared.readers))
        last.readers -= 1
        self._last = last if last.readers else None
        return last.rows

    def _held(self, key: Any, read: Callable[[], Tensor], device: torch.device) -> Tensor:
        """Return eigenvectors on ``device``, read once."""
        if (key, device) not in self._vectors:
            self._vectors[key, device] = read().to(device, torch.float32)
        return self._vectors[key, device]

    @staticmethod
    def _require_first(name: str, running: _Running, batch: Batch | Routed) -> None:
        whole = batch.batch if isinstance(batch, Routed) else batch
        if whole in running.batches:
            raise CoverageError(
                f"layer {name!r} was called twice in one call of the model, so the gradient of a "
                "sequence is a sum over both; measure with per='position', or leave the layer out"
            )
        running.batches.add(whole)


def bytes_of(basis: Eigenbasis) -> int:
    """Return the bytes of the float32 sums of all layers of a basis."""
    return sum(4 * basis[name].ranks[0] * basis[name].ranks[1] for name in basis)
