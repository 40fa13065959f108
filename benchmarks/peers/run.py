"""Benchmark of every peer against curvfast, in turns, in separate processes: ``make bench-peers``.

    python -m peers.run                every case, into benchmarks/results/cpu/peers.json
    python -m peers.run --smoke        curvfast and the official steps alone, tiny, one round
    python -m peers.run --only ours kronfluence --cases peers --batches 2

A peer whose factors are off the float64 truth is listed as wrong and not timed; one that cannot run
is listed with its own error. Where labels are sampled no two draw the same ones, so G is held
against the truth by its trace alone.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import official
import torch
from results import environment, write
from safetensors.torch import save_file
from table import markdown

from peers import ABSENT, PEERS, SAMPLING
from peers.cases import CASES, Case

ROOT = Path(__file__).parents[2]
SCHEMA = 1
TOLERANCE = 1e-5
DRAW_TOLERANCE = 0.05
ROUNDS = 5
OWN = ("ours", "official")
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, print."""
    options = _options(arguments)
    results: dict[str, Any] = {
        "schema_version": SCHEMA, "environment": environment(), "tolerance": TOLERANCE,
        "draw_tolerance": DRAW_TOLERANCE, "rounds": options.rounds, "absent": ABSENT,
        "cases": _earlier(options.out),
    }  # fmt: skip
    for name in options.cases:
        case = CASES[name]
        if options.batches:
            case = dataclasses.replace(case, batches=options.batches)
        peers = [peer for peer in options.only if peer in SAMPLING or not case.sampled]
        rows = compared(name, case, peers, options.rounds)
        results["cases"][name] = {**dataclasses.asdict(case), "dtype": "float32", "rows": rows}
        write(options.out, results)
        sys.stdout.write(f"\n{name}: {case}\n\n{table(rows)}\n")
    for peer, why in ABSENT.items():
        sys.stdout.write(f"{peer}: {why}\n")
    sys.stdout.write(f"wrote {options.out}\n")
    return 0


def _earlier(path: Path) -> dict[str, Any]:
    """Return the cases measured before, of which those asked for are measured anew."""
    return json.loads(path.read_text(encoding="utf-8"))["cases"] if path.exists() else {}


def compared(name: str, case: Case, peers: Sequence[str], rounds: int) -> list[Row]:
    """Return a row for each of ``peers``, measured on one case."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        _write_truth(case, folder / "truth.safetensors")
        workers = [stack.enter_context(Remote(peer, name, case, folder)) for peer in peers]
        for worker in workers:
            worker.listen()
        for worker in workers:
            worker.ask("first")
            worker.row["status"] = verdict(worker.row, case)
        for turn in range(rounds):
            # Forwards and backwards, so that no peer always follows the same one, or runs first.
            for worker in workers if turn % 2 == 0 else reversed(workers):
                worker.ask("go")
        for worker in workers:
            worker.ask("count")
            worker.row["status"] = verdict(worker.row, case)
        return [worker.row for worker in workers]


def verdict(row: Row, case: Case) -> str:
    """Return "ok", "wrong" or "failed".

    Raises:
        RuntimeError: If it is curvfast itself, or the official steps, that is not ok.
    """
    # A NaN error fails every comparison.
    right = (
        row.get("error_a", math.nan) <= TOLERANCE
        and row.get("error_g", math.nan) <= (DRAW_TOLERANCE if case.sampled else TOLERANCE)
    )  # fmt: skip
    found = "failed" if "failed" in row else "ok" if right else "wrong"
    if found != "ok" and row["peer"] in OWN:
        raise RuntimeError(f"{row['peer']} is {found}, and peers cannot be held against it: {row}")
    return found


class Remote:
    """The client of a ``peers.worker``; answers are stored in ``row``."""

    def __init__(self, peer: str, name: str, case: Case, folder: Path) -> None:
        self.row: Row = {"peer": peer, "status": "ok"}
        self._log = folder / f"{peer}.log"
        paths = (str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", ""))
        environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(folder),
            "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        arguments = [peer, name, str(case.batches), str(folder / "truth.safetensors")]
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "peers.worker", *arguments],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=environment, cwd=folder,
            )  # fmt: skip

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        # The worker exits when its standard input ends.
        self._process.communicate()

    def ask(self, command: str) -> None:
        """Send a command and store the answer, if the peer has not failed."""
        if self.row["status"] == "ok":
            self._process.stdin.write(f"{command}\n")
            self._process.stdin.flush()
            self.listen()

    def listen(self) -> None:
        """Store the next answer."""
        line = self._process.stdout.readline()
        last = self._log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        answer = json.loads(line) if line else {"failed": f"the process ended: {last}"}
        if "seconds" in answer:
            self.row.setdefault("seconds", []).append(answer["seconds"])
        else:
            self.row.update(answer)
        if "failed" in answer:
            self.row["status"] = "failed"


def _write_truth(case: Case, path: Path) -> None:
    """Write the sums of a run in float64 (in which transformers' norms compute in float32)."""
    model = case.model()
    with torch.random.fork_rng():
        torch.manual_seed(2)
        found = official.collect(
            model.double(), case.data(), case.names(model), dtype=torch.float64,
            sampled=case.sampled,
        )  # fmt: skip
    sums = found.sums()
    save_file({f"{kind}.{n}": sums[n][i] for n in sums for i, kind in enumerate("ag")}, str(path))


def table(rows: Sequence[Row]) -> str:
    """Return a case's rows as a table; times are of whole fits, counts of one batch."""
    head = [
        "", "version", "s", "× ours", "RSS MB", "alive MB", "GFLOP", "MB moved", "operations",
        "error A", "error G",
    ]  # fmt: skip
    ours = next((row for row in rows if row["peer"] == "ours" and "seconds" in row), None)
    return markdown([head, *(_line(row, ours) for row in rows)])


def _line(row: Row, ours: Row | None) -> list[str]:
    named = [row["peer"], row.get("version", "")]
    if row["status"] == "failed":
        return [*named, f"failed: {row['failed']}", *[""] * 8]
    errors = [f"{row['error_a']:.1e}", f"{row['error_g']:.1e}"]
    if row["status"] == "wrong":
        return [*named, "wrong", *[""] * 6, *errors]
    seconds = statistics.median(row["seconds"])
    ratio = f"{seconds / statistics.median(ours['seconds']):.2f}" if ours else ""
    return [
        *named, f"{seconds:.2f}", ratio, f"{row['resident_peak_bytes'] / 1e6:.0f}",
        f"{row['live_peak_bytes'] / 1e6:.0f}", f"{row['flop_per_batch'] / 1e9:.1f}",
        f"{row['traffic_bytes_per_batch'] / 1e6:.0f}", f"{row['operations_per_batch']:.0f}",
        *errors,
    ]  # fmt: skip


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one round")
    parser.add_argument("--only", nargs="+", choices=PEERS, metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--batches", type=int, help="batches of a fit (8)")
    parser.add_argument("--rounds", type=int, help=f"timed fits of each ({ROUNDS})")
    parser.add_argument("--out", type=Path, help="the JSON (benchmarks/results/cpu/peers.json)")
    options = parser.parse_args(arguments)
    results = ROOT / "benchmarks" / "results" / ("dry-run" if options.smoke else "cpu")
    options.only = options.only or (list(OWN) if options.smoke else list(PEERS))
    options.cases = options.cases or (
        ["smoke", "smoke-sampled"] if options.smoke else ["peers", "wide", "words", "sampled"]
    )
    options.rounds = options.rounds or (1 if options.smoke else ROUNDS)
    options.out = options.out or results / "peers.json"
    return options


if __name__ == "__main__":
    sys.exit(main())
