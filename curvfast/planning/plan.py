"""plan_collection(): memory, passes and FLOPs of a collection, without allocation or download."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.errors import CurvfastError, InputError, first_line
from curvfast.hf.meta import example_batch, meta_model
from curvfast.model.forward import forward_of
from curvfast.model.layers import LayerSpec, select
from curvfast.planning.collection_plan import CollectionPlan
from curvfast.planning.cost import busiest, cost, eigh_bytes, layer_plans
from curvfast.planning.memory import fit
from curvfast.planning.meta_device import meta_twin, on_meta
from curvfast.planning.rehearsal import Rehearsal, estimate, rehearse
from curvfast.planning.units import parse_bytes, parse_count, parse_rate

DEVICES = ("cuda", "cpu")


def plan_collection(
    model: str | PathLike[str] | nn.Module | Any,
    layers: LayerSpec = "mlp",
    *,
    tokens: int | str = 1_000_000,
    batch: int = 8,
    seq_len: int = 512,
    example: Mapping[str, Any] | Tensor | None = None,
    world_size: int = 1,
    device_memory: int | str | None = None,
    flops: float | str | None = None,
    dtype: torch.dtype | str | None = None,
    device: str = "cuda",
) -> CollectionPlan:
    """Plan :func:`curvfast.collect_from`: its bytes, passes and FLOPs.

    One batch is rehearsed on the meta device, by the model's own code: no weight is allocated and
    nothing is downloaded. Memory is that of tensors, FLOPs those of matrix products.

    Args:
        model: A built-in name (``"olmo-2-7b"``), a folder with a config.json, the path of one, a
            configuration of transformers, or any module, which is left untouched.
        layers: As in :func:`curvfast.collect_from`.
        tokens: Labels to count: tokens of a language model, or images. ``"1M"`` is understood.
        batch: Sequences or images of a batch.
        seq_len: Tokens of a sequence.
        example: A batch as ``collect_from`` is given, instead of ``batch`` and ``seq_len``; needed
            for a module that is none of transformers'. Its shapes are used; it is taken to be
            unpadded.
        world_size: Devices. Where the layers do not fit one they share the layers, and what is left
            over shares the data.
        device_memory: Bytes of a device, such as ``"141GB"`` (10⁹) or ``"80GiB"`` (2³⁰); 5 % of it
            is left to what tensors do not show.
        flops: FLOP/s that one device reaches, such as ``"400T"``; needed for a time.
        dtype: Of the weights; None is bfloat16, or a module's own.
        device: ``"cuda"`` or ``"cpu"``; none has to be there.

    Returns:
        The plan.

    Raises:
        InputError: If an argument is out of range, or there is no such model.
        LayerNotFound: If ``layers`` matches nothing.
    """
    for name, value in (("batch", batch), ("seq_len", seq_len), ("world_size", world_size)):
        if value < 1:
            raise InputError(f"{name}={value}: pass a positive number")
    if device not in DEVICES:
        raise InputError(f"device={device!r}: pass 'cuda' or 'cpu'")
    target, wanted = torch.device(device), parse_count(tokens)
    held = None if device_memory is None else parse_bytes(device_memory)
    rate = None if flops is None else parse_rate(flops)
    twin = _twin(model, None if dtype is None else _float_dtype(dtype))
    arguments = _arguments(twin, example, batch, seq_len)
    chosen = select(twin, layers)
    seen = _seen(twin, chosen, arguments, target)
    plans = layer_plans(chosen, seen, target)
    weights = _weight_bytes(twin)
    found = fit(plans, weights, seen, held, world_size)
    parts = found.division.parts
    spent, batches = cost(seen, parts), -(-wanted // seen.labels)
    return CollectionPlan(
        model=str(model) if isinstance(model, str | PathLike) else type(twin).__name__,
        device=device,
        dtype=str(next(twin.parameters()).dtype).removeprefix("torch."),
        batch_shape=tuple(next(v for v in arguments.values() if isinstance(v, Tensor)).shape),
        labels=seen.labels,
        batches=batches,
        layers=plans,
        memory=found.division.memory,
        device_memory=held,
        fits=found.fits,
        verdict=found.verdict,
        settings=found.settings,
        layers_per_pass=found.division.layers_per_pass,
        passes=len(parts),
        world_size=world_size,
        cost=spent,
        eigh_flops=sum(part.eigh_flops for part in parts),
        eigh_bytes=eigh_bytes(max(part.widest for part in parts)),
        seconds=rate and busiest(spent, batches, len(parts), world_size) / rate,
        upper_bound_because=seen.guessed_because,
    )


def _twin(model: Any, dtype: torch.dtype | None) -> nn.Module:
    if isinstance(model, nn.Module):
        twin = meta_twin(model)
        return twin if dtype is None else twin.to(dtype)
    return meta_model(model, dtype or torch.bfloat16)


def _float_dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"dtype={dtype!r}: pass 'bfloat16', 'float16' or 'float32'")
    return found


def _arguments(
    model: nn.Module, example: Mapping[str, Any] | Tensor | None, batch: int, seq_len: int
) -> dict[str, Any]:
    if example is None:
        return dict(example_batch(model, batch, seq_len))
    if isinstance(example, Tensor):
        example = {forward_of(model).first(): example}
    # Which positions are real is a matter of values; without a mask, all are.
    return on_meta({k: v for k, v in example.items() if k not in ("labels", "attention_mask")})


def _seen(
    model: nn.Module, chosen: Any, arguments: Mapping[str, Any], device: torch.device
) -> Rehearsal:
    try:
        return rehearse(model, chosen, arguments, device)
    except CurvfastError:
        raise
    # A model may need values, which the meta device lacks; the plan is then an estimate.
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        return estimate(model, chosen, arguments, reason)


def _weight_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
