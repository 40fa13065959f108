"""Memory of a collection, term by term, and its division into passes that fit a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from curvfast.planning.cost import LayerPlan, Totals, totals
from curvfast.planning.rehearsal import Rehearsal
from curvfast.planning.units import show_bytes


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors on the device that runs the model.

    Not included: a GPU's context, the workspaces of its libraries, and fragmentation of its
    allocator.
    """

    weights: int
    """Parameters and buffers."""
    activations: int
    """Activations that autograd keeps from the forward to the backward."""
    logits: int
    """The logits, or their gradient in the same memory."""
    temporaries: int
    """Further tensors alive at the peak: gradients in flight, copies in another dtype."""
    sums: int
    """Packed sums, during the whole pass."""
    factors: int
    """Dense factors, read from the sums at the end, after the activations are freed."""

    @property
    def during_pass(self) -> int:
        """Peak of bytes alive during the pass."""
        return self.weights + self.activations + self.logits + self.temporaries + self.sums

    @property
    def read_out(self) -> int:
        """Peak of bytes alive while the factors are read from the sums."""
        return self.weights + self.sums + self.factors

    @property
    def peak(self) -> int:
        """Peak of bytes alive."""
        return max(self.during_pass, self.read_out)

    def to_dict(self) -> dict[str, Any]:
        """Return the terms and their sums as JSON-able values."""
        return {
            **asdict(self),
            "during_pass": self.during_pass,
            "read_out": self.read_out,
            "peak": self.peak,
        }


def with_sums_here(weights: int, seen: Rehearsal, needs: Totals) -> Memory:
    """Return the memory of a pass whose sums and factors stay on the device."""
    return _memory(weights, seen, needs.sums, needs.factors)


def with_sums_elsewhere(weights: int, seen: Rehearsal, needs: Totals) -> Memory:
    """Return the memory of a pass whose sums and factors live on the host or on disk.

    One sum at a time is moved to the device, at the peak the largest.
    """
    return _memory(weights, seen, needs.largest_sum, 0)


def _memory(weights: int, seen: Rehearsal, sums: int, factors: int) -> Memory:
    return Memory(
        weights=weights,
        activations=seen.activations,
        logits=seen.logits,
        temporaries=seen.peak - seen.activations - seen.logits,
        sums=sums,
        factors=factors,
    )


# The rest is reserved for a GPU's context and allocator fragmentation.
USABLE = 0.95


@dataclass(frozen=True)
class Division:
    """Layers divided into passes over the data: runs of them, in module order."""

    layers_per_pass: int
    parts: tuple[Totals, ...]
    """Total cost of each pass."""
    memory: Memory
    """Memory of the largest pass; the factors of earlier ones have left the device."""


@dataclass(frozen=True)
class Fit:
    """A division into passes, with the verdict whether it fits."""

    division: Division
    fits: bool | None
    """Whether one pass on each device is enough; None where no device memory was given."""
    verdict: str
    """The answer in a line."""
    settings: tuple[str, ...]
    """Settings that would make it fit, each sufficient by itself; empty if none would."""


def fit(
    layers: Sequence[LayerPlan],
    weights: int,
    seen: Rehearsal,
    device_memory: int | None,
    world_size: int,
) -> Fit:
    """Return the fewest passes that fit, and the other settings that would.

    Args:
        layers: The chosen layers.
        weights: Bytes of parameters and buffers.
        seen: The rehearsed batch.
        device_memory: Bytes of a device; None asks for no verdict.
        world_size: Devices; where the layers do not fit one, they share them.

    Returns:
        The division and the verdict; one pass, where no division fits.
    """
    whole = _divide(layers, 1, weights, seen)
    if device_memory is None:
        needed = show_bytes(whole.memory.peak)
        return Fit(whole, None, f"needs {needed} on a device in one pass", ())
    limit = int(USABLE * device_memory)
    if whole.memory.peak <= limit:
        return Fit(whole, True, f"fits in one pass: {_of(whole, device_memory)}", ())
    divided = _fewest_passes(layers, weights, seen, limit)
    if divided is not None and len(divided.parts) <= world_size:
        verdict = f"fits in one pass on {len(divided.parts)} devices that share the layers"
        return Fit(divided, True, f"{verdict}: {_of(divided, device_memory)}", ())
    settings = _settings(divided, whole, with_sums_elsewhere(weights, seen, whole.parts[0]), limit)
    verdict = f"does not fit in one pass: {_of(whole, device_memory)}"
    if whole.memory.peak <= device_memory:
        verdict += f", of which {1 - USABLE:.0%} is left to what tensors do not show"
    if settings:
        verdict += "; pass " + " or ".join(settings)
    else:
        verdict += (
            f", and {show_bytes(whole.memory.during_pass - whole.memory.sums)} of it without any "
            "sum; use smaller batches, shorter sequences or a narrower dtype"
        )
    return Fit(divided or whole, False, verdict, settings)


def _of(division: Division, device_memory: int) -> str:
    """Return "97.2 of 141 GB": a common unit is written once."""
    (peak, one), (held, two) = (
        show_bytes(size).split() for size in (division.memory.peak, device_memory)
    )
    return f"{peak} of {held} {two}" if one == two else f"{peak} {one} of {held} {two}"


def _settings(
    divided: Division | None, whole: Division, elsewhere: Memory, limit: int
) -> tuple[str, ...]:
    found = []
    if divided is not None:
        passes = len(divided.parts)
        found.append(
            f"layers_per_pass={divided.layers_per_pass} ({passes} passes of "
            f"{show_bytes(divided.memory.peak)}, or one on {passes} devices)"
        )
    if elsewhere.peak <= limit:
        here, sums = show_bytes(elsewhere.peak), whole.memory.sums
        host = show_bytes(sums + whole.memory.factors)
        found.append(f"sums_device='cpu' ({here} here, {host} of host memory)")
        found.append(f"sums_device='disk' ({here} here, {show_bytes(sums)} on disk)")
    return tuple(found)


def _fewest_passes(
    layers: Sequence[LayerPlan], weights: int, seen: Rehearsal, limit: int
) -> Division | None:
    for passes in range(2, len(layers) + 1):
        division = _divide(layers, passes, weights, seen)
        if division.memory.peak <= limit:
            return division
    return None


def _divide(layers: Sequence[LayerPlan], passes: int, weights: int, seen: Rehearsal) -> Division:
    size = -(-len(layers) // passes)
    parts = tuple(totals(layers[i : i + size]) for i in range(0, len(layers), size))
    each = [with_sums_here(weights, seen, part) for part in parts]
    return Division(size, parts, max(each, key=lambda memory: memory.peak))
