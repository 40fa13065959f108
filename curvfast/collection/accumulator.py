"""Accumulator: running second moments of layers, as float32 sums and integer counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from curvfast import ops
from curvfast.collection.hooks import Arrival, SharedInput
from curvfast.collection.placement import Placement
from curvfast.model.batch import Batch, Routed
from curvfast.model.families import LinearLayer
from curvfast.model.rows import Rows
from curvfast.ops import MomentRequest, TriangularSum

SIDES = ("inputs", "gradients", "weighted_inputs", "weighted_gradients")


@dataclass
class Moment:
    """A running sum Σ x xᵀ and its rows; one may serve several layers."""

    sum: TriangularSum
    rows: int = 0
    members: set[str] = field(default_factory=set)
    spilled: TriangularSum | None = None
    """The float64 sum of spilled calls, if float32 is spilled."""
    calls: int = 0
    """Calls since the last spill."""

    def request(
        self, x: Tensor, rows: Rows, scale: float, weights: Tensor | None = None
    ) -> MomentRequest:
        """Add the rows of x [..., d] that count to the count; return the update that sums them."""
        x, index = rows.view(x)  # [rows, d] or [sequences, length, d]
        self.rows += x.shape[:-1].numel() if index is None else len(index)
        self.calls += 1
        if weights is not None:
            weights = rows.view(weights.unsqueeze(-1))[0].squeeze(-1)
        return MomentRequest(self.sum, x, rows=index, weights=weights, scale=scale)

    def spill(self) -> None:
        """Move the float32 sum into float64."""
        if self.spilled is None:
            self.spilled = TriangularSum(
                torch.zeros_like(self.sum.tiles, dtype=torch.float64), self.sum.d
            )
        self.spilled.tiles.add_(self.sum.tiles)
        self.sum.tiles.zero_()
        self.calls = 0

    def dense(self) -> Tensor:
        """Return the sum as a matrix [d, d], float32."""
        if self.spilled is None:
            return self.sum.dense()
        total = TriangularSum(self.spilled.tiles + self.sum.tiles, self.sum.d)
        return total.dense().float()

    def release(self) -> None:
        """Release the sum; the count stays."""
        self.sum = TriangularSum(self.sum.tiles.new_empty(0, self.sum.width), self.sum.d)
        self.spilled = None

    def split(self, leaving: set[str]) -> Moment:
        """Split off ``leaving`` into a separate moment that starts from the sum so far."""
        self.members -= leaving
        spilled = None if self.spilled is None else self.spilled.clone()
        return Moment(self.sum.clone(), self.rows, set(leaving), spilled, self.calls)


class Accumulator:
    """Running sums of layers' Kronecker factors by side: inputs, gradients, and both weighted.

    Layers that read one tensor share one A for as long as they always do: when a call shows that a
    member of a shared moment did not read this tensor, those that did split off a copy. Weighted
    moments are never shared, since the weights of inputs are of the layer's own gradients.
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
            place: Where sums are, as of :class:`Placement`.
            overlap: Whether updates run on a separate CUDA stream.
            marginals: Whether the weighted sides are summed too.
        """
        self._layers = layers
        self._spill_every = spill_every
        self._marginals = marginals
        self._placement = Placement(place, overlap=overlap)
        self.sides: dict[str, dict[str, Moment]] = {side: {} for side in SIDES}
        self.inputs, self.gradients = self.sides["inputs"], self.sides["gradients"]

    def add(self, arrival: Arrival, unit: float) -> None:
        """Add the counted rows of one complete call to the sums of its layer.

        Args:
            arrival: The call; its input is added once for all layers that read it.
            unit: What g is multiplied by to be the gradient of the summed loss.
        """
        name, batch, shared, x = arrival.layer, arrival.batch, arrival.shared, arrival.x
        if x is not None and not shared.added:
            shared.added = True
            self.add_input(name, batch, shared, x)
        self.add_gradient(name, batch, arrival.g, unit)
        if x is not None and self._marginals:
            self.add_weighted(name, batch, x, arrival.g, unit)

    def add_input(self, name: str, batch: Batch | Routed, shared: SharedInput, x: Tensor) -> None:
        """Add the rows of an input x [..., d_in] to the A of every layer that read it.

        Args:
            name: One of the readers.
            batch: The batch, which determines the counted rows.
            shared: The record of the layers that read it.
            x: The input.
        """
        rows = batch.rows(name, x.shape[:-1], x.device)
        for moment in self._moments_of(shared.readers, self._layers[name].d_in, x.device):
            self._add(moment, x, rows, 1.0)

    def add_gradient(self, name: str, batch: Batch | Routed, g: Tensor, unit: float) -> None:
        """Add the rows of an output gradient g [..., d_out] to the G of its layer.

        Args:
            name: The layer.
            batch: The batch, which determines the counted rows.
            g: The gradient, in the units of the caller's loss.
            unit: What g is multiplied by to be the gradient of the summed loss.
        """
        moment = self._own("gradients", name, g.device)
        self._add(moment, g, batch.rows(name, g.shape[:-1], g.device), unit * unit)

    def add_weighted(
        self, name: str, batch: Batch | Routed, x: Tensor, g: Tensor, unit: float
    ) -> None:
        """Add the rows of one call to Σ‖g‖² a aᵀ and to Σ‖a‖² g gᵀ of its layer.

        Args:
            name: The layer.
            batch: The batch, which determines the counted rows.
            x: The input, [..., d_in].
            g: The gradient of that very call, [..., d_out], in the units of the caller's loss.
            unit: What g is multiplied by to be the gradient of the summed loss.
        """
        rows_a, rows_g = (batch.rows(name, x.shape[:-1], each.device) for each in (x, g))
        own_a = self._own("weighted_inputs", name, x.device)
        own_g = self._own("weighted_gradients", name, g.device)
        self._add(own_a, x, rows_a, unit * unit, _squared_norms(g).to(x.device))
        self._add(own_g, g, rows_g, unit * unit, _squared_norms(x).to(g.device))

    def flush(self) -> None:
        """Run all pending updates; needed before a sum is read."""
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
        if not rows.count:
            return
        self._placement.add(moment.request(x, rows, scale, weights))
        if self._spill_every is not None and moment.calls >= self._spill_every:
            self.flush()
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
        """Return what :meth:`restore` needs: JSON-able facts, and tensors by key."""
        self.flush()
        facts: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for side, moments in self.sides.items():
            facts[side] = []
            for moment in {id(m): m for m in moments.values()}.values():
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
        for moments in self.sides.values():
            for moment in moments.values():
                moment.release()

    def _empty(self, members: set[str], d: int, device: torch.device) -> Moment:
        return Moment(self._placement.new_sum(d, device), members=set(members))

    def _moments_of(self, readers: set[str], d: int, device: torch.device) -> list[Moment]:
        """Return the moments of ``readers``, each serving readers only."""
        moments = {id(m): m for m in map(self.inputs.get, sorted(readers)) if m is not None}
        result = []
        for moment in moments.values():
            if not moment.members <= readers:
                self.flush()
                moment = moment.split(moment.members & readers)
                self.inputs.update(dict.fromkeys(moment.members, moment))
            result.append(moment)
        newcomers = readers - self.inputs.keys()
        if newcomers:
            moment = self._empty(newcomers, d, device)
            self.inputs.update(dict.fromkeys(newcomers, moment))
            result.append(moment)
        return result


def _squared_norms(x: Tensor) -> Tensor:
    """Return ‖x_t‖² of each row of x [..., d], [...] float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=wide)
    return norms.float().square_()


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
