"""Races: functions timed in turns in one run, so that noise affects all alike."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from results import environment, write

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROUNDS = 15
# Seconds of one race: slower functions are run fewer times, but at least five.
BUDGET, FEWEST = 6.0, 5
_RACES: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="write every ratio there, as JSON")


@pytest.fixture
def race(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., float]:
    """Time ``ours`` against ``theirs`` in turns; record and return the ratio of medians.

    A ratio above 1 says that ours is faster. ``rival`` names who is raced, where there are several.
    pytest-benchmark's own figures are of ours alone.
    """

    def run(
        ours: Callable[[], Any],
        theirs: Callable[[], Any],
        *,
        rounds: int = ROUNDS,
        rival: str = "",
        pause: float = 0.0,
    ) -> float:
        times: dict[bool, list[float]] = {True: [], False: []}
        started = time.perf_counter()
        ours(), theirs()
        once = time.perf_counter() - started
        rounds = max(FEWEST, min(rounds, int(BUDGET / max(once, 1e-9))))
        for turn in range(2 * rounds):
            # ABBA order: neither side always runs on the other's warm caches.
            mine = turn % 4 in (0, 3)
            racer = ours if mine else theirs
            if pause:
                # Time for the other's threads to sleep, and for its own to wake up.
                time.sleep(pause)
                racer()
            start = time.perf_counter()
            racer()
            times[mine].append(time.perf_counter() - start)
        ratios = sorted(b / a for a, b in zip(times[True], times[False], strict=True))
        ratio = statistics.median(times[False]) / statistics.median(times[True])
        found = {
            "name": request.node.name,
            **({"rival": rival} if rival else {}),
            "ratio": round(ratio, 3),
            "quartiles": [
                round(ratios[len(ratios) // 4], 3),
                round(ratios[3 * len(ratios) // 4], 3),
            ],
            "rounds": rounds,
        }
        benchmark.extra_info.setdefault("ratios", {})[rival] = ratio
        if "used" not in benchmark.extra_info:
            benchmark.extra_info["used"] = True
            benchmark.pedantic(ours, rounds=1, iterations=1)
        _RACES.append({**found, "facts": _facts(benchmark)})
        return ratio

    return run


def _facts(benchmark: Any) -> dict[str, Any]:
    return {k: v for k, v in benchmark.extra_info.items() if k not in ("ratios", "used")}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _RACES:
        return
    terminalreporter.section("how many times faster than the rival (median; quartiles)")
    for race in _RACES:
        low, high = race["quartiles"]
        name = f"{race['name']} {race.get('rival', '')}"
        terminalreporter.write_line(f"{name:<64} {race['ratio']:>9.2f}   [{low}, {high}]")
    target = config.getoption("--results")
    if target is not None:
        write(target, {"schema_version": 1, "environment": environment(), "races": _with(target)})
        terminalreporter.write_line(f"wrote {target}")


def _with(target: Path) -> list[dict[str, Any]]:
    """Return the races of this run, and those of an earlier one that it did not run."""
    earlier = json.loads(target.read_text(encoding="utf-8"))["races"] if target.exists() else []
    run = {(race["name"], race.get("rival")): race for race in (*earlier, *_RACES)}
    return list(run.values())


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["capability"] = torch.backends.cpu.get_cpu_capability()
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine_info.pop("node", None)
    machine_info["machine"] = platform.machine()
