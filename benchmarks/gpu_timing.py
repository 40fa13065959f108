"""Times on a GPU: variants in turns, a cold L2 before each run, medians of device events."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

REAL = torch.cuda.is_available()
DEVICE = torch.device("cuda" if REAL else "cpu")
_FLUSH_BYTES = 256 * 2**20


def medians(variants: Mapping[str, Callable[[], Any]], rounds: int = 15) -> dict[str, float]:
    """Return the median milliseconds of each variant, run in turns.

    Args:
        variants: What to time, by name.
        rounds: Turns each takes after one that warms up.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    flush = torch.empty(_FLUSH_BYTES if REAL else 1, dtype=torch.int8, device=DEVICE)
    for turn in range((rounds if REAL else 1) + 1):
        for name, run in variants.items():
            flush.zero_()
            elapsed = _once(run)
            if turn:
                times[name].append(elapsed)
    return {name: statistics.median(found) for name, found in times.items()}


def _once(run: Callable[[], Any]) -> float:
    if not REAL:
        started = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - started)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    run()
    after.record()
    torch.cuda.synchronize()
    return float(before.elapsed_time(after))


def gemm_ceiling() -> float:
    """Return the TFLOP/s torch reaches on a large 16-bit product of random data, here and now."""
    size = 8192 if REAL else 64
    a, b = (torch.randn(size, size, device=DEVICE).bfloat16() for _ in range(2))
    found = medians({"mm": lambda: a @ b})["mm"]
    return 2 * size**3 / found / 1e9


def without_tf32(run: Callable[[], Any]) -> Callable[[], Any]:
    """Return ``run`` with float32 products exact."""
    return _precision(run, "highest")


def with_tf32(run: Callable[[], Any]) -> Callable[[], Any]:
    """Return ``run`` with float32 products on tensor cores."""
    return _precision(run, "high")


def _precision(run: Callable[[], Any], level: str) -> Callable[[], Any]:
    def wrapped() -> Any:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(level)
        try:
            return run()
        finally:
            torch.set_float32_matmul_precision(before)

    return wrapped
