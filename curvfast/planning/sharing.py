"""Layers that share one A: those that always read the same tensor."""

from __future__ import annotations

from collections.abc import Iterable


def shared_inputs(readings: Iterable[set[str]], names: Iterable[str]) -> dict[str, str]:
    """Return the owner of each layer's A: the first layer that it shares it with, or itself.

    A group made by one call is split by a later one that only some of its members read, and never
    merged, as :class:`curvfast.accumulate.Accumulator` splits its sums.

    Args:
        readings: The layers that read each input tensor, in the order they were read.
        names: Every layer, in module order.

    Returns:
        Layer name -> name of the layer that owns its A.
    """
    groups: list[set[str]] = []
    for readers in readings:
        newcomers = readers.difference(*groups)
        parts = [part for group in groups for part in (group & readers, group - readers) if part]
        groups = parts + ([newcomers] if newcomers else [])
    owners: dict[str, str] = {}
    for name in names:
        group = next((group for group in groups if name in group), {name})
        owners[name] = next((first for first in owners if first in group), name)
    return owners
