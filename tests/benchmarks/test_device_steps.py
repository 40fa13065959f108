"""What hangs, crashes or fails on a GPU machine ends itself alone, and is told with its reason."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import device
import device_build
import device_plan
import gpu
import gpu_cases
import gpu_checks
import gpu_timing
import pytest
from device_events import Told
from device_record import Record
from device_steps import Run, Step

ROOT = Path(__file__).parents[2]
WORKER = [sys.executable, str(Path(__file__).parent / "planted_worker.py")]
# Longer than any unit takes on a machine that does much else; what hangs on purpose has less.
LONG, SHORT = 120.0, 6.0

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="GPU machines run Linux")


def ran(folder: Path, steps: Sequence[Step], seconds: float = LONG) -> dict[str, Any]:
    record = Record(folder, "A", {"commit": "planted"})
    Run(record, WORKER, seconds).run(steps)
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text(encoding="utf-8"))


def is_gone(process: int) -> bool:
    """Return whether a process ended; one that nobody waited for yet did."""
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return True
    return status.rpartition(")")[2].split()[0] == "Z"


def test_a_hanging_unit_is_killed_with_all_its_processes_and_the_rest_runs(tmp_path: Path) -> None:
    found = ran(tmp_path, [Step("all", ("fine/1", "hang", "fine/2"), LONG, unit_seconds=SHORT)])
    row, why = found["hang"]
    assert "longer than 6 s" in why["failed"]
    assert all(is_gone(process) for process in row["processes"])
    assert [row["unit"] for row in found["fine"]] == ["fine/1", "fine/2"]
    assert len({row["process"] for row in found["fine"]}) == 2


@pytest.mark.parametrize("case", ["crash", "wrong", "sticky"])
def test_what_fails_is_told_and_ends_nothing_else(tmp_path: Path, case: str) -> None:
    found = ran(tmp_path, [Step("all", ("fine/1", case, "fine/2", "fine/3"), LONG)])
    (why,) = [row["failed"] for row in found[case] if "failed" in row]
    if case != "sticky":
        # What was measured before it failed is kept.
        assert "before" in found[case][0]
    said = {"crash": "SIGABRT\nabout to crash", "wrong": "is wrong", "sticky": "illegal memory"}
    assert said[case] in why
    assert [row["unit"] for row in found["fine"]] == ["fine/1", "fine/2", "fine/3"]
    # An assertion leaves its process as it was; after the others a new one is started.
    assert len({row["process"] for row in found["fine"]}) == (1 if case == "wrong" else 2)
    assert ("about to crash" in next(tmp_path.glob("*.log")).read_text()) == (case == "crash")


def test_every_row_is_on_disk_before_the_next_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHED", str(tmp_path))
    found = ran(tmp_path, [Step("all", ("watch",), 30)])
    assert [set(row) for row in found["watch"]] == [{"unit", "first"}, {"unit", "process"}]


def test_the_runs_own_clock_ends_everything_and_says_what_was_not_reached(tmp_path: Path) -> None:
    steps = [
        Step("beside", ("hang/beside",), LONG, background=True),
        Step("first", ("hang/1", "fine/1"), LONG), Step("second", ("fine/2",), LONG),
    ]  # fmt: skip
    found = ran(tmp_path, steps, SHORT)
    assert {row["skipped"] for row in found["fine"]} == {"the time was used up"}
    assert len(found["fine"]) == 2
    processes = [process for row in found["hang"] for process in row.get("processes", [])]
    assert len(processes) == 4
    assert all(is_gone(process) for process in processes)


def test_a_worker_that_never_begins_fails_all_it_was_to_do(tmp_path: Path) -> None:
    steps = [Step("all", ("unborn/1", "fine/1"), LONG), Step("then", ("fine/2",), LONG)]
    found = ran(tmp_path, steps)
    assert "exit code 3 before it began" in found["unborn"][0]["failed"]
    assert "failed" in found["fine"][0]
    assert "process" in found["fine"][1]


def test_what_needs_something_that_failed_is_skipped_and_says_so(tmp_path: Path) -> None:
    found = ran(
        tmp_path,
        [
            Step("beside", ("fine/beside",), LONG, background=True),
            Step("checks", ("fine/1", "wrong"), LONG, processes=2, alone=True),
            Step("bad", ("watch", "hang"), LONG, needs=("fine/1", "wrong")),
            Step("good", ("fine/2",), LONG, needs=("fine/1", "fine/beside")),
        ],
    )
    for case in ("watch", "hang"):
        assert [row["skipped"] for row in found[case]] == ["needs wrong, which did not pass"]
    assert "process" in found["fine"][-1]
    assert {step["name"] for step in found["steps"]} == {"beside", "checks", "good"}


def test_a_run_never_writes_over_another(tmp_path: Path) -> None:
    records = [Record(tmp_path, "A", {"commit": "abc"}) for _ in range(3)]
    names = [record.path.name for record in records]
    assert names == ["A-abc.json", "A-abc-2.json", "A-abc-3.json"]


def test_an_event_half_written_is_read_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "events"
    told = Told(path)
    assert told.events() == []
    path.write_text('{"begin": "one"}\n{"end"', encoding="utf-8")
    assert told.events() == [{"begin": "one"}]
    with path.open("a", encoding="utf-8") as file:
        file.write(': "one"}\n')
    assert told.events() == [{"end": "one"}]


def test_the_commit_is_what_the_environment_says_else_git_else_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CURVFAST_COMMIT", "0123456789ab")
    assert device.commit() == "0123456789ab"
    monkeypatch.delenv("CURVFAST_COMMIT")
    monkeypatch.setattr(device, "ROOT", tmp_path)
    assert device.commit() == "unknown"
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(
            ["git", "-c", "user.name=x", "-c", "user.email=x@y.z", "-C", tmp_path, *words],
            check=True,
        )
    assert len(device.commit()) == 12


@pytest.mark.parametrize("part", ["A", "B"])
def test_the_plan_names_only_what_there_is_and_checks_before_it_measures(part: str) -> None:
    earlier: set[str] = set()
    for step in device_plan.steps(part, dry_run=False, failed=set):
        assert step.units
        assert set(step.needs) <= earlier, step.name
        for unit in step.units:
            case, *words = unit.split("/")
            gpu._case(case)
            if case == "check":
                assert words[0] in gpu_checks.CHECKS
            if case in gpu_cases.RACES and case != "packed_sum":
                assert any(need.startswith("check/") for need in step.needs), unit
            assert unit not in earlier
            earlier.add(unit)
    checked = {unit.split("/")[1] for unit in earlier if unit.startswith("check/")}
    if part == "A":
        assert checked == set(gpu_checks.CHECKS) - {"packed"}


def test_a_sanitizer_looks_first_at_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_plan.shutil, "which", lambda name: f"/bin/{name}")
    failed = {"check/two-sums-fp32", "tests"}
    plan = device_plan.steps("B", dry_run=False, failed=lambda: failed)
    (step,) = [step for step in plan if step.name == "sanitizer"]
    assert step.units == ("check/two-sums-fp32/small",)
    assert step.prefix[0] == "/bin/compute-sanitizer"


def test_extensions_are_built_for_the_card_at_hand_on_every_core() -> None:
    assert device_build.architecture((9, 0)) == "90a-real"
    assert device_build.architecture((8, 0)) == "80-real"
    configure, build = device_build.commands("90a-real")
    assert "-DCURVFAST_CUDA_ARCHITECTURES=90a-real" in configure
    assert build[-2:] == ["--parallel", str(os.cpu_count())]


def test_a_runner_that_does_not_end_itself_is_ended(tmp_path: Path) -> None:
    deaf = tmp_path / "python"
    deaf.write_text(
        "#!/bin/bash\ntrap '' TERM\necho started\nwhile :; do read -r -t 9 < <(:); done"
    )
    deaf.chmod(0o755)
    done = subprocess.run(
        [ROOT / "benchmarks" / "device.sh", "A", "--seconds", "-6"],
        capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "PYTHON": str(deaf)},
    )  # fmt: skip
    assert done.stdout == "started\n"
    assert done.returncode == 128 + signal.SIGKILL


def test_device_sh_refuses_what_it_does_not_know() -> None:
    for words, said in ((["C"], "what is 'C'?"), ([], "say which part")):
        done = subprocess.run(
            [ROOT / "benchmarks" / "device.sh", *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert said in done.stderr


class VirtualQueue:
    """A device and a host with clocks of their own, both in milliseconds."""

    def __init__(self) -> None:
        self.host, self.device = 0.0, 0.0

    def work(self, ms: float) -> None:
        """Enqueue work: the device begins it when it is free, and not before it is told."""
        self.device = max(self.device, self.host) + ms

    spin = work

    def mark(self) -> float:
        return max(self.device, self.host)

    def reached(self, event: float) -> bool:
        return event <= self.host

    def between(self, before: float, after: float) -> float:
        return after - before


def test_host_time_is_not_in_the_devices_time(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = VirtualQueue()
    monkeypatch.setattr(gpu_timing.time, "perf_counter", lambda: queue.host / 1e3)

    def run() -> None:
        queue.host += 0.3
        queue.work(0.1)

    bare = gpu_timing.once(run, queue, 0.0)
    assert not bare.hidden
    assert bare.ms == pytest.approx(0.4)
    queue.host = queue.device
    found = gpu_timing.hidden_run(run, queue, 0.2)
    assert found.hidden
    assert found.ms == pytest.approx(0.1)
    assert found.host_ms == pytest.approx(0.3)


def test_what_waits_for_the_device_is_said_to_hold_host_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queue = VirtualQueue()
    monkeypatch.setattr(gpu_timing.time, "perf_counter", lambda: queue.host / 1e3)

    def run() -> None:
        queue.work(0.1)
        queue.host = queue.device

    assert not gpu_timing.hidden_run(run, queue, 0.2).hidden
