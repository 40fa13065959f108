"""How far a call travels, and how much code the method is: benchmarks/architecture.py, bounded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import architecture
import pytest

# Caches are warm in a process of its own, whatever ran before in this one.
TRACE = """
import json, architecture
found = architecture.journeys()
ways = {name: [sorted(way.files), way.moves, sorted(way.rooms())] for name, way in found.items()}
print(json.dumps({"ways": ways, "method": sorted(architecture.method_files())}))
"""
APART = {"experiments", "report", "baselines", "analysis", "sweeps", "export", "planning"}


@pytest.fixture(scope="module")
def traced() -> dict[str, Any]:
    # The suite interprets its kernels; a caller does not.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", TRACE], cwd=architecture.ROOT / "benchmarks", check=True,
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("journey", "files", "moves", "rooms"),
    [
        ("forward", 20, 140, 3),
        ("backward", 29, 280, 3),
        ("factors", 32, 280, 5),
        ("eigh", 9, 124, 3),
        ("keep", 8, 46, 2),
        ("edit", 19, 180, 5),
        ("collect_from", 63, 1400, 7),
        ("correct", 55, 1120, 7),
    ],
)
def test_a_call_travels_no_further(
    journey: str, files: int, moves: int, rooms: int, traced: dict[str, Any]
) -> None:
    seen, made, entered = traced["ways"][journey]
    assert len(seen) <= files, seen
    assert made <= moves
    assert len(entered) <= rooms, entered


def test_the_method_is_short_and_runs_nothing_else(traced: dict[str, Any]) -> None:
    method = traced["method"]
    assert "editing/edit.py" in method
    assert not {name.partition("/")[0] for name in method} & APART
    assert sum(architecture.code_lines(architecture.PACKAGE / name) for name in method) <= 8500


def test_few_rooms_stand_on_few_floors_in_no_circle() -> None:
    arrows = architecture.graph()
    assert not architecture.cycles(arrows)
    assert not architecture.cycles(architecture.file_graph())
    assert architecture.folders() <= 30
    assert architecture.floors(arrows) <= 11
