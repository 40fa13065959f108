"""Accumulator: running second moments of layers, as float32 sums and integer counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from curvfast import ops
from curvfast.collection.device_flags import DeviceFlags
from curvfast.collection.hooks import Arrival, SharedInput
from curvfast.collection.moment import Moment, distinct, require_finite, squared_norms
from curvfast.collection.placement import Placement
from curvfast.collection.readings import Reading, Readings
from curvfast.model.counted import CallRows
from curvfast.model.families import LinearLayer
from curvfast.model.rows import Rows
from curvfast.ops import TriangularSum, devices

SIDES = ("inputs", "gradients", "weighted_inputs", "weighted_gradients")


class Accumulator:
    """Running sums of layers' Kronecker factors by side: inputs, gradients, and both weighted.

    Layers that read one tensor share one A for as long as they always do: when a call shows that a
    member of a shared moment did not read this tensor, those that did split off a copy. Weighted
    moments are never shared, since the weights of inputs are of the layer's own gradients.

    A call that is not finite in a counted row adds nothing at all: a shared input is added when the
    gradients of its readers have come, for those whose gradients count. On accelerators no one
    waits for a value: there the sums take what is not finite, and refuse to be read.
    """

    def __init__(
        self,
        layers: dict[str, LinearLayer],
        spill_every: int | None = None,
        place: str = "same",
        *,
        overlap: bool = False,
        marginals: bool = False,
    ) -> None:
        """Start without sums; each is allocated with its first rows.

        Args:
            layers: Layers by name.
            spill_every: Calls of a layer after which float32 is added to float64; None: never.
            place: Where the sums are stored: a place of :class:`Placement`.
            overlap: Whether updates run on a separate CUDA stream.
            marginals: Whether the weighted sides are summed too.
        """
        self._layers = layers
        self._spill_every = spill_every
        self._marginals = marginals
        self._placement = Placement(place, overlap=overlap)
        self._new = partial(
            Accumulator, layers, spill_every, place, overlap=overlap, marginals=marginals
        )
        self.sides: dict[str, dict[str, Moment]] = {side: {} for side in SIDES}
        self.inputs, self.gradients = self.sides["inputs"], self.sides["gradients"]
        self._readings = Readings(self._count_input)
        self._bad_inputs: WeakSet[SharedInput] = WeakSet()
        self._flags = DeviceFlags()
        self._pending: Accumulator | None = None

    def add(self, arrival: Arrival, unit: float, number: int = 0) -> bool:
        """Add the counted rows of one complete call to the sums of its layer.

        Args:
            arrival: The call; its input is added once for all layers that read it.
            unit: What g is multiplied by to be the gradient of the summed loss; finite.
            number: The batch's, by which a value on an accelerator is reported when sums are read.

        Returns:
            False if an input or gradient in a counted row is not finite: then nothing was added.
        """
        if self._pending is not None:
            return self._pending.add(arrival, unit, number)
        name, batch, x = arrival.layer, arrival.batch, arrival.x
        if x is None:
            if arrival.shared in self._bad_inputs:
                return False
            return self.add_gradient(name, batch, arrival.g, unit, number, again=arrival.again)
        if arrival.again:
            # Its input, and whether that is finite, came with the first gradient.
            added = self.add_gradient(name, batch, arrival.g, unit, number, again=True)
            if added and self._marginals:
                self.add_weighted(name, batch, x, arrival.g, unit, again=True)
            return added
        reading = self._readings.of(arrival, partial(self._is_finite, name, number=number))
        added = reading.finite and self.add_gradient(name, batch, arrival.g, unit, number)
        if added and self._marginals:
            self.add_weighted(name, batch, x, arrival.g, unit)
        self._readings.arrived(arrival, reading, counts=added)
        return added

    def add_input(
        self, name: str, batch: CallRows, shared: SharedInput, x: Tensor, number: int = 0
    ) -> bool:
        """Add the rows of an input x [..., d_in] to the A of every layer that read it, at once.

        A gradient that is not finite later adds nothing to G: A then holds more rows than G.

        Args:
            name: One of the readers.
            batch: The batch, which determines the counted rows.
            shared: The record of the layers that read it.
            x: The input.
            number: The batch's.

        Returns:
            False if x is not finite: then nothing was added, nor will its readers' gradients be.
        """
        if self._pending is not None:
            return self._pending.add_input(name, batch, shared, x, number)
        rows = batch.rows(name, x.shape[:-1], x.device)
        added = True
        for moment in self._moments_of("inputs", shared.readers, self._sums_for(x)):
            added = self._add_if_finite(moment, x, rows, 1.0, (name, "input", number)) and added
        if not added:
            self._bad_inputs.add(shared)
        return added

    def add_gradient(
        self,
        name: str,
        batch: CallRows,
        g: Tensor,
        unit: float,
        number: int = 0,
        *,
        again: bool = False,
    ) -> bool:
        """Add the rows of an output gradient g [..., d_out] to the G of its layer, as :meth:`add`.

        Args:
            name: The layer.
            batch: The batch, which determines the counted rows.
            g: The gradient, in the units of the caller's loss.
            unit: What g is multiplied by to be the gradient of the summed loss.
            number: The batch's.
            again: Whether an earlier gradient of the same rows counted them.
        """
        rows = batch.rows(name, g.shape[:-1], g.device)
        moment = self._own("gradients", name, g.device)
        before = moment.rows
        call = (name, "gradient", number)
        added = self._add_if_finite(moment, g, rows, unit * unit, call)
        moment.rows = before if again else moment.rows
        return added

    def add_weighted(
        self, name: str, batch: CallRows, x: Tensor, g: Tensor, unit: float, *, again: bool = False
    ) -> None:
        """Add the rows of one call to Σ‖g‖² a aᵀ and to Σ‖a‖² g gᵀ of its layer.

        Args:
            name: The layer.
            batch: The batch, which determines the counted rows.
            x: The input, [..., d_in], finite.
            g: The gradient of that very call, [..., d_out], in the units of the caller's loss.
            unit: What g is multiplied by to be the gradient of the summed loss.
            again: Whether an earlier gradient of the same rows counted them.
        """
        rows_a, rows_g = (batch.rows(name, x.shape[:-1], each.device) for each in (x, g))
        own_a = self._own("weighted_inputs", name, x.device)
        own_g = self._own("weighted_gradients", name, g.device)
        counted = own_a.rows, own_g.rows
        self._add(own_a, x, rows_a, unit * unit, squared_norms(g).to(x.device))
        self._add(own_g, g, rows_g, unit * unit, squared_norms(x).to(g.device))
        if again:
            own_a.rows, own_g.rows = counted

    def begin_pending(self) -> None:
        """Keep what is added from here on apart: whatever is read is of what is committed."""
        self._pending = self._pending or self._new()

    def pending_is_finite(self) -> bool:
        """Return whether what is pending is; of values on an accelerator, waited for once."""
        return self._pending is None or not self._pending._flags.bad()

    def commit(self) -> None:
        """Add what is pending to the sums; layers that share an A keep sharing it."""
        pending = self._pending
        if pending is None:
            return
        pending.flush()
        self.flush()
        for side, moments in pending.sides.items():
            for moment in filter(lambda m: m.rows, distinct(moments)):
                like = partial(self._placement.like, moment.sum)
                for own in self._moments_of(side, moment.members, like):
                    own.absorb(moment)
                    self._spill_when_due(own)
        pending._clear()

    def discard(self) -> None:
        """Forget what is pending."""
        if self._pending is not None:
            self._pending.flush()
            self._pending._clear()

    def _clear(self) -> None:
        """Empty every sum; their memory stays."""
        self._flags.clear()
        for moments in self.sides.values():
            for moment in distinct(moments):
                moment.clear()

    def end_readings(self) -> None:
        """Add the inputs whose last reader's gradient never came; needed before rows are told."""
        self._readings.end()

    def _count_input(self, reading: Reading) -> None:
        """Add an input to the A of the readers whose gradients count."""
        x = reading.x
        for moment in self._moments_of("inputs", reading.counted, self._sums_for(x)):
            self._add(moment, x, reading.rows, 1.0)

    def _sums_for(self, x: Tensor) -> Callable[[], TriangularSum]:
        """Return what makes sums of rows as those of x."""
        return partial(self._placement.new_sum, x.shape[-1], x.device)

    def _is_finite(self, name: str, x: Tensor, rows: Rows, number: int) -> bool:
        """Return whether the counted rows of an input are finite; on an accelerator, note it."""
        x, index = rows.view(x)
        if devices.on_accelerator(x.device):
            self._flags.note(name, "input", ops.finite_flag(x, index), number)
            return True
        return ops.all_finite(x, index)

    def _add_if_finite(
        self, moment: Moment, x: Tensor, rows: Rows, scale: float, call: tuple[str, str, int]
    ) -> bool:
        """Add rows if they are finite; on an accelerator add them and note whether they were."""
        if devices.on_accelerator(x.device):
            name, what, number = call
            self._flags.note(name, what, ops.finite_flag(*rows.view(x)), number)
            self._add(moment, x, rows, scale)
            return True
        request = moment.request(x, rows, scale)
        if request is None:
            return True
        if not self._placement.add_if_finite(request):
            moment.take_back(rows)
            return False
        self._spill_when_due(moment)
        return True

    def require_finite(self) -> None:
        """Make sure that nothing in the sums is NaN or infinite.

        Raises:
            NonFiniteError: If a layer's values on an accelerator were, or squares overflowed.
        """
        self.flush()
        self._flags.require_finite()
        for side, moments in self.sides.items():
            require_finite(side, moments)

    def flush(self) -> None:
        """Run all updates in waiting; needed before a sum is read."""
        self.end_readings()
        self._placement.flush()

    def _own(self, side: str, name: str, device: torch.device) -> Moment:
        """Return a moment of one layer alone."""
        moments = self.sides[side]
        if name not in moments:
            moments[name] = self._empty({name}, self._width(side, name), device)
        return moments[name]

    def _add(
        self, moment: Moment, x: Tensor, rows: Rows, scale: float, weights: Tensor | None = None
    ) -> None:
        request = moment.request(x, rows, scale, weights)
        if request is None:
            return
        self._placement.add(request)
        self._spill_when_due(moment)

    def _spill_when_due(self, moment: Moment) -> None:
        if self._spill_every is not None and moment.calls >= self._spill_every:
            self._placement.flush()
            moment.spill()

    def groups(self) -> dict[str, list[list[str]]]:
        """Return which layers share a sum, by side, each group sorted."""
        return {
            side: sorted({tuple(sorted(m.members)) for m in moments.values()})  # type: ignore[misc]
            for side, moments in self.sides.items()
        }

    def regroup(self, side: str, groups: Sequence[Sequence[str]]) -> list[Moment]:
        """Part sums until exactly these groups share one, and make those there are none of.

        Args:
            side: One of :data:`SIDES`.
            groups: Each within one of :meth:`groups`, or of layers without rows here.

        Returns:
            The moment of each group.
        """
        self.flush()
        moments = self.sides[side]
        found = []
        for group in groups:
            moment = moments.get(group[0])
            if moment is None:
                moment = self._fresh(side, group)
            elif moment.members != set(group):
                moment = moment.split(set(group))
            moments.update(dict.fromkeys(group, moment))
            found.append(moment)
        return found

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what :meth:`restore` needs: JSON-able facts, and tensors by key.

        Raises:
            NonFiniteError: As :meth:`require_finite`.
        """
        self.require_finite()
        return self._snapshot()

    def copy_from(self, other: Accumulator) -> None:
        """Hold what another of the same layers holds, be it finite or not."""
        self.restore(*other._snapshot())
        self._flags.absorb(other._flags)

    def _snapshot(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        self.flush()
        facts: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for side, moments in self.sides.items():
            facts[side] = []
            for moment in distinct(moments):
                key = f"{side}.{len(facts[side])}"
                tensors[key] = moment.sum.tiles
                if moment.spilled is not None:
                    tensors[f"{key}.spilled"] = moment.spilled.tiles
                facts[side].append(
                    {
                        "key": key, "members": sorted(moment.members),
                        "rows": moment.rows, "calls": moment.calls,
                    }
                )  # fmt: skip
        return facts, tensors

    def restore(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go back to a state; sums are where they were, or where this placement puts them."""
        self._readings.clear()
        self.discard()
        for side, moments in self.sides.items():
            moments.clear()
            for entry in facts[side]:
                moment = self._fresh(side, entry["members"])
                moment.sum.tiles.copy_(tensors[entry["key"]])
                moment.rows, moment.calls = entry["rows"], entry["calls"]
                spilled = tensors.get(f"{entry['key']}.spilled")
                if spilled is not None:
                    tiles = spilled.to(moment.sum.tiles.device)
                    moment.spilled = TriangularSum(tiles, moment.sum.d)
                moments.update(dict.fromkeys(entry["members"], moment))

    def _fresh(self, side: str, members: Sequence[str]) -> Moment:
        """Return an empty moment of layers of one width, where their weights are."""
        device = self._layers[members[0]].parameter.device
        return self._empty(set(members), self._width(side, members[0]), device)

    def _width(self, side: str, name: str) -> int:
        layer = self._layers[name]
        return layer.d_in if side.endswith("inputs") else layer.d_out

    def release(self) -> None:
        """Release every sum; the counts stay."""
        self._pending = None
        for moments in self.sides.values():
            for moment in moments.values():
                moment.release()

    def _empty(self, members: set[str], d: int, device: torch.device) -> Moment:
        return Moment(self._placement.new_sum(d, device), members=members)

    def _moments_of(
        self, side: str, readers: set[str], new_sum: Callable[[], TriangularSum]
    ) -> list[Moment]:
        """Return the moments of ``readers``, each serving readers only."""
        own = self.sides[side]
        result = []
        for moment in distinct({name: own[name] for name in sorted(readers) if name in own}):
            if not moment.members <= readers:
                self._placement.flush()
                moment = moment.split(moment.members & readers)
                own.update(dict.fromkeys(moment.members, moment))
            result.append(moment)
        newcomers = readers - own.keys()
        if newcomers:
            moment = Moment(new_sum(), members=newcomers)
            own.update(dict.fromkeys(newcomers, moment))
            result.append(moment)
        return result


def sum_bytes(layers: dict[str, LinearLayer]) -> int:
    """Return the bytes of the packed sums of ``layers`` if none shares its A: an upper bound."""
    return sum(
        ops.sum_bytes(d, layer.parameter.device)
        for layer in layers.values()
        for d in (layer.d_in, layer.d_out)
    )


def factor_bytes(layers: dict[str, LinearLayer]) -> int:
    """Return the bytes of the factors read from the sums, likewise an upper bound."""
    return sum(4 * (layer.d_in**2 + layer.d_out**2) for layer in layers.values())
