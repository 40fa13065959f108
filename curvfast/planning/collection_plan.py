"""CollectionPlan: what a collection will take, and its text tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from curvfast.display import aligned
from curvfast.planning.cost import Cost, LayerPlan, totals
from curvfast.planning.memory import Memory
from curvfast.planning.units import show, show_bytes


@dataclass(frozen=True)
class CollectionPlan:
    """Memory, passes and FLOPs of :func:`curvfast.collect_from`; prints as a table."""

    model: str
    device: str
    """Device type the figures are for: sums have wider tiles on a CPU."""
    dtype: str
    """Dtype of the weights."""
    batch_shape: tuple[int, ...]
    """Shape of the first input of the model."""
    labels: int
    """Labels drawn in a batch."""
    batches: int
    """Batches until the labels asked for are counted."""
    layers: tuple[LayerPlan, ...]
    memory: Memory
    """Memory on each device, in the largest pass."""
    device_memory: int | None
    fits: bool | None
    """Whether one pass on each device is enough; None without ``device_memory``."""
    verdict: str
    """The answer in a line."""
    settings: tuple[str, ...]
    """Settings that would make one pass fit, each sufficient by itself."""
    layers_per_pass: int
    passes: int
    """Passes over the data, of all devices together."""
    world_size: int
    cost: Cost
    """FLOPs of one batch, in all passes."""
    eigh_flops: int
    """FLOPs of decomposing every factor once, by 9 d³."""
    eigh_bytes: int
    """Bytes while the widest factor is decomposed in float64, by 5 d² numbers."""
    seconds: float | None
    """Seconds of forward, backward, moments and sampling at the given FLOP/s; None without."""
    upper_bound_because: str | None
    """Why the figures are estimated, with no A shared, instead of rehearsed; None if rehearsed."""

    def to_dict(self) -> dict[str, Any]:
        """Return every figure as JSON-able values."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            **plain,
            "layers": [layer.to_dict() for layer in self.layers],
            "memory": self.memory.to_dict(),
            "cost": self.cost.to_dict(),
        }

    def __str__(self) -> str:
        """Return the plan as tables, equal layers collapsed, with the verdict last."""
        return table(self)


Row = Sequence[str]


def table(plan: CollectionPlan) -> str:
    """Return ``plan`` as aligned tables."""
    shape = " × ".join(map(str, plan.batch_shape))
    title = (
        f"{plan.model}, {plan.dtype}, on {plan.device}: {plan.batches:,} batches of {shape}, "
        f"{plan.labels:,} labels each"
    )
    blocks = [title, *_caution(plan), aligned([*_layers(plan)]), aligned([*_memory(plan)])]
    blocks += [aligned([*_cost(plan)]), plan.verdict]
    return "\n\n".join(blocks)


def pattern(name: str) -> str:
    """Return a layer's name with ``*`` for every number in it: its kind."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _caution(plan: CollectionPlan) -> list[str]:
    if plan.upper_bound_because is None:
        return []
    return [
        "An upper bound for sums and factors, a guess for the rest: the model does not run on the "
        f"meta device ({plan.upper_bound_because})"
    ]


def _layers(plan: CollectionPlan) -> Iterator[Row]:
    yield "layers", "count", "d_in", "d_out", "sums of A", "sums of G", "moments"
    kinds: dict[tuple[object, ...], list[LayerPlan]] = {}
    for layer in plan.layers:
        key = (pattern(layer.name), layer.d_in, layer.d_out, pattern(layer.owner), layer.rows)
        kinds.setdefault(key, []).append(layer)
    for (kind, *_), same in kinds.items():
        one, count = same[0], len(same)
        moments = one.g_flops + (0 if one.shares else one.a_flops)
        yield (
            str(kind), str(count), str(one.d_in), str(one.d_out),
            f"= {one.owner.split('.')[-1]}" if one.shares else show_bytes(count * one.a_bytes),
            show_bytes(count * one.g_bytes), show(count * moments, "FLOP"),
        )  # fmt: skip
    whole = totals(plan.layers)
    gradients = sum(layer.g_bytes for layer in plan.layers)
    yield (
        "total", str(len(plan.layers)), "", "", show_bytes(whole.sums - gradients),
        show_bytes(gradients), show(whole.moment_flops, "FLOP"),
    )  # fmt: skip


def _memory(plan: CollectionPlan) -> Iterator[Row]:
    memory = plan.memory
    yield "memory of a device, tensors alone", "a pass", "read-out"
    for title, size, in_pass, in_read_out in (
        ("weights", memory.weights, True, True),
        ("packed sums, float32", memory.sums, True, True),
        ("activations kept for the backward", memory.activations, True, False),
        ("logits", memory.logits, True, False),
        ("temporaries", memory.temporaries, True, False),
        ("dense factors, float32", memory.factors, False, True),
        ("together", 0, True, True),
    ):
        both = (memory.during_pass, memory.read_out) if title == "together" else (size, size)
        shown = zip(both, (in_pass, in_read_out), strict=True)
        yield title, *(show_bytes(value) if there else "" for value, there in shown)


def _cost(plan: CollectionPlan) -> Iterator[Row]:
    spent = plan.cost
    passes = "" if plan.passes == 1 else f", {plan.passes} passes"
    yield f"cost{passes}", "a batch", "all data"
    for title, flops in (
        ("forward", spent.forward),
        ("backward, of activations alone", spent.backward),
        ("second moments, one triangle", spent.moments),
        ("sampling", spent.sampling),
        ("together", spent.total),
    ):
        yield title, show(flops, "FLOP"), show(flops * plan.batches, "FLOP")
    yield "moments and sampling over the rest", f"{spent.overhead:.1%}", f"{spent.overhead:.1%}"
    if plan.seconds is not None:
        yield "time at the rate given", "", _duration(plan.seconds)
    yield "eigendecompositions, 9 d³", "", show(plan.eigh_flops, "FLOP")
    yield "the widest, 5 d² of float64", "", show_bytes(plan.eigh_bytes)


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
