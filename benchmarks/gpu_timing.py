"""Times on a GPU: variants in turns, a cold L2 before each run, medians of device events.

The device is kept busy while the host prepares and launches a run, so that what the events tell is
the device's time alone; the host's is a figure of its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch

REAL = torch.cuda.is_available()
DEVICE = torch.device("cuda" if REAL else "cpu")
_FLUSH_BYTES = 256 * 2**20
_SHORTEST_SPIN_MS = 0.2
_TRIES = 3


@dataclass(frozen=True)
class Timing:
    """One variant's times, medians over its turns."""

    ms: float
    spread: float
    """Between the quartiles, as a share of the median."""
    host_us: float
    """What the host spent until everything was launched."""
    host_hidden: bool
    """Whether the device was still busy by then; if not, ``ms`` holds host time."""


@dataclass(frozen=True)
class Once:
    """One run: milliseconds of the device and of the host, and whether the first hid the second."""

    ms: float
    host_ms: float
    hidden: bool


class Queue(Protocol):
    """A device's stream of work, as far as timing needs it."""

    def spin(self, ms: float) -> None:
        """Keep the device busy for a while, without waiting for it."""

    def mark(self) -> Any:
        """Enqueue an event."""

    def reached(self, event: Any) -> bool:
        """Return whether the device came to the event already."""

    def between(self, before: Any, after: Any) -> float:
        """Wait for the second event and return the milliseconds from the first to it."""


class CudaQueue:
    """The current stream of the current CUDA device."""

    def spin(self, ms: float) -> None:
        torch.cuda._sleep(int(ms * _cycles_a_millisecond()))

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def reached(self, event: torch.cuda.Event) -> bool:
        return bool(event.query())

    def between(self, before: torch.cuda.Event, after: torch.cuda.Event) -> float:
        after.synchronize()
        return float(before.elapsed_time(after))


class HostQueue:
    """No device: what is launched has run when the call returns."""

    def spin(self, ms: float) -> None:
        pass

    def mark(self) -> float:
        return time.perf_counter()

    def reached(self, event: float) -> bool:
        return True

    def between(self, before: float, after: float) -> float:
        return 1e3 * (after - before)


@cache
def _cycles_a_millisecond() -> float:
    """Return how many cycles torch's spin counts in a millisecond at the clock of now."""
    cycles = 20_000_000
    for _ in range(2):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        torch.cuda._sleep(cycles)
        after.record()
        after.synchronize()
    return cycles / float(before.elapsed_time(after))


def once(run: Callable[[], Any], queue: Queue, spin_ms: float) -> Once:
    """Time one run behind a spin of the device.

    Args:
        run: What to time. One that waits for the device itself is never hidden.
        queue: Where it runs.
        spin_ms: How long the device spins first.
    """
    queue.spin(spin_ms)
    before = queue.mark()
    started = time.perf_counter()
    run()
    host_ms = 1e3 * (time.perf_counter() - started)
    after = queue.mark()
    hidden = not queue.reached(before)
    return Once(queue.between(before, after), host_ms, hidden)


def hidden_run(run: Callable[[], Any], queue: Queue, spin_ms: float) -> Once:
    """Time one run behind a spin that outlasts its host time, longer at each of a few tries."""
    for _ in range(_TRIES):
        found = once(run, queue, spin_ms)
        if found.hidden:
            break
        spin_ms = 3 * max(spin_ms, found.host_ms)
    return found


def timings(
    variants: Mapping[str, Callable[[], Any]], rounds: int = 15, *, waits: bool = False
) -> dict[str, Timing]:
    """Return the times of each variant, run in turns.

    Args:
        variants: What to time, by name.
        rounds: Turns each takes after two that warm up.
        waits: Whether the variants wait for the device themselves: nothing can be hidden then.
    """
    queue: Queue = CudaQueue() if REAL else HostQueue()
    flush = torch.empty(_FLUSH_BYTES if REAL else 1, dtype=torch.int8, device=DEVICE)
    warm_up = (1 if waits else 2) if REAL else 0
    host = dict.fromkeys(variants, 0.0)
    found: dict[str, list[Once]] = {name: [] for name in variants}
    for turn in range(warm_up + (rounds if REAL else 1)):
        for name, run in variants.items():
            flush.zero_()
            if waits or turn < warm_up or not REAL:
                run_once = once(run, queue, 0.0)
            else:
                spin = max(_SHORTEST_SPIN_MS, 2 * host[name])
                run_once = hidden_run(run, queue, spin)
            host[name] = run_once.host_ms
            if turn >= warm_up:
                found[name].append(run_once)
    return {name: _timing(runs) for name, runs in found.items()}


def _timing(runs: list[Once]) -> Timing:
    times = sorted(run.ms for run in runs)
    middle = statistics.median(times)
    quarter = len(times) // 4
    return Timing(
        ms=middle, spread=(times[-1 - quarter] - times[quarter]) / middle if middle else 0.0,
        host_us=1e3 * statistics.median(run.host_ms for run in runs),
        host_hidden=all(run.hidden for run in runs),
    )  # fmt: skip


@cache
def gemm_ceiling() -> float:
    """Return the TFLOP/s torch reaches on a large 16-bit product of random data, here and now."""
    size = 8192 if REAL else 64
    a, b = (torch.randn(size, size, device=DEVICE).bfloat16() for _ in range(2))
    return 2 * size**3 / timings({"mm": lambda: a @ b}, 7)["mm"].ms / 1e9


@cache
def copy_ceiling() -> float:
    """Return the GB/s of a copy in the device's memory, bytes read and written."""
    size = 2**31 if REAL else 2**16
    a, b = (torch.empty(size, dtype=torch.int8, device=DEVICE) for _ in range(2))
    return 2 * size / timings({"copy": lambda: a.copy_(b)}, 7)["copy"].ms / 1e6


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
