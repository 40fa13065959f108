"""Text tables of a plan: layers by kind, memory, cost, and the verdict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from curvfast.planning.layers import LayerPlan, totals
from curvfast.planning.sizes import show, show_bytes
from curvfast.tables import aligned

if TYPE_CHECKING:
    from curvfast.planning.plan import CollectionPlan

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
