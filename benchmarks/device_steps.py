"""Runs units in processes of their own, each under a clock: none can take another's figures along.

A unit that hangs is killed with all its processes, one that crashes is reported, and what was to
come after it goes on in a new process. Nothing here imports torch.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

from device_events import Told
from device_record import Record

_POLL_SECONDS = 0.05
_TERM_SECONDS = 1.0
_KILL_SECONDS = 2.0


@dataclass(frozen=True)
class Step:
    """Some units, and the clock they run under."""

    name: str
    units: tuple[str, ...]
    seconds: float
    """What the step may take; less where the run's own clock ends sooner."""
    unit_seconds: float = inf
    """What one unit may take; the first of a process includes its start."""
    processes: int = 1
    """How many run at a time, the units dealt among them."""
    alone: bool = False
    """Whether each unit has a process of its own."""
    background: bool = False
    """Whether the next step starts at once."""
    needs: tuple[str, ...] = ()
    """Units that must have passed; without them these are skipped."""
    prefix: tuple[str, ...] = ()
    """What the worker runs under, a sanitizer say."""


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    told: Told
    output: Path
    remaining: deque[str]
    step: Step
    deadline: float
    unit_started: float
    in_hand: str | None = None
    failed: bool = False
    ended: set[str] = field(default_factory=set)


class Run:
    """One part of a run: its steps in turn, within its seconds."""

    def __init__(self, record: Record, worker: Sequence[str], seconds: float) -> None:
        """Keep a record of units that ``worker``, a command, is called with."""
        self._record = record
        self._command = list(worker)
        self._end = time.monotonic() + seconds
        self._scratch = tempfile.TemporaryDirectory(prefix="curvfast-device-")
        self._started = 0
        self._background: list[tuple[_Worker, float]] = []
        self.failed: set[str] = set()
        self.passed: set[str] = set()

    def run(self, steps: Iterable[Step]) -> None:
        """Run the steps; whatever happens, no process outlives them."""
        active: list[_Worker] = []
        try:
            for step in steps:
                self._wait_for(step.needs)
                missing = [unit for unit in step.needs if unit not in self.passed]
                if missing:
                    self._skip(step.units, f"needs {', '.join(missing)}, which did not pass")
                elif step.background:
                    worker = self._start(step, deque(step.units), self._deadline(step))
                    self._background.append((worker, time.monotonic()))
                else:
                    self._run_step(step, active)
            while self._background:
                self._poll_background()
                time.sleep(_POLL_SECONDS)
        finally:
            _kill([*active, *(worker for worker, _ in self._background)])
            self._record.write()
            self._scratch.cleanup()

    def left(self) -> float:
        """Return the seconds that are left of the run."""
        return self._end - time.monotonic()

    def _deadline(self, step: Step) -> float:
        return min(self._end, time.monotonic() + step.seconds)

    def _run_step(self, step: Step, active: list[_Worker]) -> None:
        started, deadline = time.monotonic(), self._deadline(step)
        if step.alone:
            waiting = deque(deque([unit]) for unit in step.units)
        else:
            shares = min(step.processes, len(step.units))
            waiting = deque(deque(step.units[i::shares]) for i in range(shares))
        while waiting or active:
            while waiting and len(active) < step.processes and time.monotonic() < deadline:
                active.append(self._start(step, waiting.popleft(), deadline))
            for worker in self._gone(active):
                active.remove(worker)
                if worker.remaining:
                    waiting.appendleft(worker.remaining)
            self._poll_background()
            if not active and time.monotonic() >= deadline:
                for units in waiting:
                    self._skip(units, "the time was used up")
                break
            time.sleep(_POLL_SECONDS)
        self._record.step(step.name, started)

    def _wait_for(self, units: Iterable[str]) -> None:
        while any(unit in worker.step.units for worker, _ in self._background for unit in units):
            self._poll_background()
            time.sleep(_POLL_SECONDS)

    def _poll_background(self) -> None:
        gone = self._gone([worker for worker, _ in self._background])
        for worker, started in list(self._background):
            if worker in gone:
                self._background.remove((worker, started))
                self._skip(worker.remaining, "an earlier unit of its process ended it")
                self._record.step(worker.step.name, started)

    def _start(self, step: Step, units: deque[str], deadline: float) -> _Worker:
        self._started += 1
        place = Path(self._scratch.name) / str(self._started)
        output, events = place.with_suffix(".out"), place.with_suffix(".events")
        command = [*step.prefix, *self._command, "--events", str(events), *units]
        with output.open("wb") as file:
            # A session of its own: all its processes can be killed, and no signal of ours is its.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                start_new_session=True, preexec_fn=_end_with_parent,
            )  # fmt: skip
        now = time.monotonic()
        return _Worker(process, Told(events), output, units, step, deadline, now)

    def _gone(self, workers: list[_Worker]) -> list[_Worker]:
        """Take in what workers told; return those that are gone, their figures kept."""
        gone = []
        for worker in workers:
            ended = worker.process.poll() is not None
            self._take(worker)
            why = _end_of(worker) if ended else _overdue(worker)
            if why:
                gone.append((worker, why))
        _kill([worker for worker, _ in gone])
        for worker, why in gone:
            self._take(worker)
            said = self._record.say(f"{worker.step.name}: {why}", worker.output)
            if worker.in_hand is not None:
                self._fail(worker.in_hand, f"{why}\n{said}")
                worker.remaining.popleft()
            elif worker.remaining and not worker.ended:
                # It never began: a new process would not either.
                for unit in worker.remaining:
                    self._fail(unit, f"{why} before it began\n{said}")
                worker.remaining.clear()
        return [worker for worker, _ in gone]

    def _take(self, worker: _Worker) -> None:
        for event in worker.told.events():
            if "begin" in event:
                worker.in_hand, worker.failed = event["begin"], False
                if worker.ended:
                    worker.unit_started = time.monotonic()
            elif "end" in event:
                unit = worker.remaining.popleft()
                worker.ended.add(unit)
                worker.in_hand = None
                if not worker.failed:
                    self.passed.add(unit)
            elif "failed" in event:
                worker.failed = True
                self._fail(event["unit"], event["failed"])
            else:
                self._record.add(event["unit"], event["row"])

    def _fail(self, unit: str, why: str) -> None:
        self.failed.add(unit)
        self._record.add(unit, {"failed": why})

    def _skip(self, units: Iterable[str], why: str) -> None:
        for unit in units:
            self._record.add(unit, {"skipped": why})


def _end_of(worker: _Worker) -> str:
    return f"its process ended with {_named(worker.process.returncode)}"


def _overdue(worker: _Worker) -> str | None:
    now = time.monotonic()
    if now >= worker.deadline:
        return "killed: the time of its step was used up"
    if now - worker.unit_started >= worker.step.unit_seconds:
        return f"killed: it took longer than {worker.step.unit_seconds:g} s"
    return None


def _kill(workers: Sequence[_Worker]) -> None:
    """End every process of the workers' groups: asked first, then not."""
    alive = [worker.process for worker in workers if worker.process.poll() is None]
    for process in alive:
        _signal(process.pid, signal.SIGTERM)
    _until_gone(alive, _TERM_SECONDS)
    for worker in workers:
        _signal(worker.process.pid, signal.SIGKILL)
    _until_gone(alive, _KILL_SECONDS)


def _named(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _signal(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        pass


def _until_gone(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    end = time.monotonic() + seconds
    while any(p.poll() is None for p in processes) and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)


def _end_with_parent() -> None:
    """Have the kernel kill this process when the one that started it is gone."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
