"""Costs of a run besides time: matrix products, memory traffic, live tensors, resident memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    mm_flop,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from curvfast.ops.native import extension

Shape = torch.Size
Moments = Mapping[str, tuple[Tensor, Tensor]]


def products(run: Callable[[], Any]) -> float:
    """Return the floating-point operations of all matrix products, of those torch leaves out too:
    products into a sum, attention on a CPU, and what curvfast's native core multiplies."""
    count = FlopCounterMode(display=False, custom_mapping=_UNCOUNTED)
    with native_calls() as calls, count:
        run()
    native = sum(2 * call.rows * extension.packed_products(call.d) for call in calls)
    return float(count.get_total_flops() + native)


@dataclass(frozen=True)
class NativeCall:
    """Rows that the native core added to a sum, which torch does not see."""

    rows: int
    d: int
    element_size: int

    @property
    def bytes(self) -> int:
        """Rows read, the triangle read and written; packing is within, as it is within a GEMM."""
        return self.rows * self.d * self.element_size + 2 * 4 * extension.packed_products(self.d)


@contextmanager
def native_calls() -> Iterator[list[NativeCall]]:
    """Yield a list that records every call of the native second moment in the block."""
    calls: list[NativeCall] = []
    original = extension.add_rows

    def add_rows(tiles: Tensor, d: int, x: Tensor, offsets: Tensor, *rest: Any) -> bool:
        calls.append(NativeCall(len(offsets), d, x.element_size()))
        return original(tiles, d, x, offsets, *rest)

    extension.add_rows = add_rows
    try:
        yield calls
    finally:
        extension.add_rows = original


def _added(_out: Shape, a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    return mm_flop(a, b)


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    gradient: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


_UNCOUNTED = {
    torch.ops.aten.addmm_: _added,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Traffic(TorchDispatchMode):
    """Counts torch's operations, and the bytes of the tensors each reads and writes.

    A view moves nothing and is not counted. What an operation updates in place it reads and writes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        read, written = _tensors((args, kwargs)), _tensors(out)
        if func._schema.is_mutable or not _storages(read) & _storages(written):
            self.operations += 1
            self.bytes += sum(x.numel() * x.element_size() for x in (*read, *written))
        return out


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _storages(tensors: Sequence[Tensor]) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tensors if x.numel()}


def traffic(run: Callable[[], Any]) -> tuple[int, int]:
    """Return the bytes that operations, the native core's too, read and wrote, and their number."""
    with native_calls() as calls, Traffic() as seen:
        run()
    return seen.bytes + sum(call.bytes for call in calls), seen.operations + len(calls)


def live_bytes(run: Callable[[], Any]) -> int:
    """Return the peak of bytes of tensors that ``run`` allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes))


def resident_peak(run: Callable[[], Any]) -> int:
    """Return the peak growth of the process's resident memory in bytes (Linux)."""
    process = Path("/proc/self")
    try:
        (process / "clear_refs").write_text("5", encoding="ascii")
    except OSError:
        # Where the mark cannot be taken down, it is right in a process whose first work this is.
        pass
    before = _status(process, "VmRSS")
    run()
    return _status(process, "VmHWM") - before


def _status(process: Path, field: str) -> int:
    lines = (process / "status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def worst_errors(found: Moments, truth: Moments) -> tuple[float, float]:
    """Return the largest relative Frobenius errors among the A, and among the G.

    Raises:
        ValueError: If the two are not of the same layers.
    """
    if found.keys() != truth.keys():
        raise ValueError(f"layers differ: {sorted(found.keys() ^ truth.keys())}")
    a, g = (
        torch.stack([_relative(found[name][side], truth[name][side]) for name in truth]).max()
        for side in (0, 1)
    )
    return float(a), float(g)


def worst_trace_error(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """Return the largest relative error of a trace, which sampled labels change little."""
    errors = [(found[name].trace() / truth[name].trace() - 1).abs() for name in truth]
    return float(torch.stack(errors).double().max())


def _relative(found: Tensor, true: Tensor) -> Tensor:
    return (found.double() - true.double()).norm() / true.double().norm()
