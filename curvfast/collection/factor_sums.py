"""Sums of a measurement: one set, or two for alternating batches, to be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from curvfast import distributed
from curvfast.collection.accumulator import SIDES, Accumulator
from curvfast.collection.config import CollectConfig
from curvfast.collection.moment import Moment
from curvfast.kfac.layer_factors import LayerFactors
from curvfast.model.families import LinearLayer


class FactorSums:
    """Second moments of layers, in one part or in two halves of the batches."""

    def __init__(
        self, layers: dict[str, LinearLayer], config: CollectConfig, halves: bool = False
    ) -> None:
        """Start empty."""
        self._layers = layers
        self._config = config
        self.parts = [
            Accumulator(
                layers,
                config.spill_every,
                config.sums_device,
                overlap=config.streams == "overlap",
                marginals=config.marginals,
            )
            for _ in range(2 if halves else 1)
        ]

    def begin_pending(self) -> None:
        """Keep what is added from here on apart, until it is committed or discarded.

        Whatever is read meanwhile is of what is committed.
        """
        for part in self.parts:
            part.begin_pending()

    def commit(self) -> bool:
        """Add what is pending to the sums, or discard it if an accelerator says it is not finite.

        Returns:
            Whether it was added.
        """
        finite = all(part.pending_is_finite() for part in self.parts)
        for part in self.parts:
            if finite:
                part.commit()
            else:
                part.discard()
        return finite

    def discard(self) -> None:
        """Forget what is pending."""
        for part in self.parts:
            part.discard()

    def rows(self, name: str) -> tuple[int, int]:
        """Return the numbers of summed inputs and gradients of a layer."""
        for part in self.parts:
            part.end_readings()
        a, g = (self._moments(side, name) for side in ("inputs", "gradients"))
        return sum(m.rows for m in a), sum(m.rows for m in g)

    def factors(self, part: int | None = None) -> dict[str, LayerFactors]:
        """Return the factors of every layer with rows, of all parts together or of one alone.

        Args:
            part: Which half, of which A and G alone are read; None means everything.

        Raises:
            NonFiniteError: If a sum overflowed, or took what was not finite on an accelerator.
        """
        for each in self.parts:
            each.require_finite()
        dense: dict[tuple[int, ...], Tensor] = {}
        found = {}
        for name in self._layers:
            a, g, weighted_a, weighted_g = (self._moments(side, name, part) for side in SIDES)
            rows_a, rows_g = (sum(m.rows for m in moments) for moments in (a, g))
            if not (rows_a and rows_g):
                continue
            found[name] = LayerFactors(_total(a, dense), _total(g, dense), rows_a, rows_g)
            if weighted_g and part is None:
                weighted = [_total(moments, dense) for moments in (weighted_a, weighted_g)]
                found[name] = replace(found[name], a_weighted=weighted[0], g_weighted=weighted[1])
        return found

    def _moments(self, side: str, name: str, part: int | None = None) -> list[Moment]:
        parts = self.parts if part is None else [self.parts[part]]
        return [each.sides[side][name] for each in parts if name in each.sides[side]]

    def add_up(self, group: distributed.Group) -> None:
        """Replace every sum and count by its total over all ranks; called by all, once.

        Raises:
            DistributedError: If another rank is gone.
        """
        if group is None:
            return
        for part in self.parts:
            part.flush()
            everywhere = distributed.gather(part.groups(), group)
            for side in SIDES:
                groups = _refined([own[side] for own in everywhere])
                if not groups:
                    continue
                moments = part.regroup(side, groups)
                rows = torch.tensor([moment.rows for moment in moments], device="cpu")
                distributed.add_(rows, group)
                for moment, total in zip(moments, rows.tolist(), strict=True):
                    moment.rows = total
                self._add_up_tiles(moments, group)

    def copy(self) -> FactorSums:
        """Return a copy that later additions to the original do not change."""
        other = FactorSums(self._layers, self._config, len(self.parts) == 2)
        # Unchecked: all ranks add up before one of them refuses.
        for mine, copied in zip(self.parts, other.parts, strict=True):
            copied.copy_from(mine)
        return other

    def _add_up_tiles(self, moments: list[Moment], group: distributed.Group) -> None:
        spilled = distributed.gather([m.spilled is not None for m in moments], group)
        for moment, anywhere in zip(moments, zip(*spilled, strict=True), strict=True):
            if any(anywhere):
                moment.spill()
            distributed.add_((moment.spilled or moment.sum).tiles, group)

    def release(self) -> None:
        """Release every sum; the counts stay."""
        for part in self.parts:
            part.release()

    def state(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """Return what :meth:`restore` needs: JSON-able facts, and tensors by key.

        Raises:
            NonFiniteError: As :meth:`factors`.
        """
        facts: list[dict[str, Any]] = []
        tensors: dict[str, Tensor] = {}
        for number, part in enumerate(self.parts):
            own, held = part.state()
            facts.append(own)
            tensors |= {f"{number}.{key}": tensor for key, tensor in held.items()}
        return facts, tensors

    def restore(self, facts: list[dict[str, Any]], tensors: Mapping[str, Tensor]) -> None:
        """Go back to a state."""
        for number, (part, own) in enumerate(zip(self.parts, facts, strict=True)):
            lead = f"{number}."
            held = {k.removeprefix(lead): t for k, t in tensors.items() if k.startswith(lead)}
            part.restore(own, held)


def _refined(everywhere: list[list[tuple[str, ...]]]) -> list[list[str]]:
    """Return the groups within which every rank that has rows shares a sum."""
    numbers = [
        {name: number for number, group in enumerate(groups) for name in group}
        for groups in everywhere
    ]
    found: dict[tuple[int | None, ...], list[str]] = {}
    for name in sorted({name for own in numbers for name in own}):
        found.setdefault(tuple(own.get(name) for own in numbers), []).append(name)
    return sorted(found.values())


def _total(moments: list[Moment], dense: dict[tuple[int, ...], Tensor]) -> Tensor:
    """Return the sum of moments as a matrix; the same moments are read once."""
    key = tuple(id(moment) for moment in moments)
    if key not in dense:
        total = moments[0].dense()
        for moment in moments[1:]:
            total.add_(moment.dense())
        dense[key] = total
    return dense[key]
