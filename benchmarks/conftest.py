"""Races: two functions timed in turns in one run, so a noisy machine slows both alike."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROUNDS = 15
_TABLE: list[tuple[str, str, float, float]] = []


@pytest.fixture
def race(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., float]:
    """Time ``ours`` against ``theirs`` in turns; record and return the ratio of medians.

    A ratio above 1 says that ours is faster. pytest-benchmark's own figures are of ours alone.
    """

    def run(ours: Callable[[], Any], theirs: Callable[[], Any], *, rounds: int = ROUNDS) -> float:
        times: dict[bool, list[float]] = {True: [], False: []}
        ours(), theirs()
        for turn in range(2 * rounds):
            # ABBA order: neither side always runs on the other's warm caches.
            mine = turn % 4 in (0, 3)
            start = time.perf_counter()
            (ours if mine else theirs)()
            times[mine].append(time.perf_counter() - start)
        ratios = sorted(b / a for a, b in zip(times[True], times[False], strict=True))
        ratio = statistics.median(times[False]) / statistics.median(times[True])
        benchmark.extra_info["ratio"] = round(ratio, 3)
        benchmark.extra_info["ratio_quartiles"] = [
            round(ratios[len(ratios) // 4], 3),
            round(ratios[3 * len(ratios) // 4], 3),
        ]
        benchmark.pedantic(ours, rounds=3, iterations=1)
        low, high = benchmark.extra_info["ratio_quartiles"]
        _TABLE.append((request.node.name, f"{ratio:.2f}", low, high))
        return ratio

    return run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _TABLE:
        return
    terminalreporter.section("how many times faster than the rival (median; quartiles)")
    for name, ratio, low, high in _TABLE:
        terminalreporter.write_line(f"{name:<52} {ratio:>6}   [{low}, {high}]")


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["capability"] = torch.backends.cpu.get_cpu_capability()
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine_info.pop("node", None)
    machine_info["machine"] = platform.machine()
