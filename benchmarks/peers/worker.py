"""Worker process of one peer: ``python -m peers.worker``.

It reads commands from standard input, a line each, and answers each by a line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import measure
from safetensors.torch import load_file

from peers import Fit, load
from peers.cases import CASES, Case

Answer = dict[str, Any]


class Worker:
    """A peer with its model and data; its public methods are the commands."""

    fit: Fit

    def __init__(self, peer: str, case: Case, truth: Path) -> None:
        self._peer, self._case, self._truth = peer, case, truth

    def start(self) -> Answer:
        """Import the peer and give it a model and data."""
        model, batches = self._case.model(), self._case.data()
        # One-time work of any process must not count as the peer's memory.
        small = batches[0]["input_ids"][:1, :8]
        model(input_ids=small, use_cache=False).logits.sum().backward()
        model.zero_grad()
        peer = load(self._peer)
        prepare = peer.prepare_sampled if self._case.sampled else peer.prepare
        self.fit = prepare(model, batches, self._case.names(model))
        return {
            "version": version(peer.PACKAGE) if peer.PACKAGE else "",
            "convention": peer.CONVENTION, "positions": peer.POSITIONS,
        }  # fmt: skip

    def first(self) -> Answer:
        """Fit once; answer the added memory of the process, and the errors."""
        found = []
        grown = measure.resident_peak(lambda: found.append(self.fit.run()))
        stored = load_file(self._truth)
        layers = [key.removeprefix("a.") for key in stored if key.startswith("a.")]
        truth = {name: (stored[f"a.{name}"], stored[f"g.{name}"]) for name in layers}
        sums = self.fit.sums(found[0])
        a, g = measure.worst_errors(sums, truth)
        if self._case.sampled:
            drawn, known = ({n: g for n, (_, g) in moments.items()} for moments in (sums, truth))
            g = measure.worst_trace_error(drawn, known)
        return {"resident_peak_bytes": grown, "error_a": a, "error_g": g}

    def go(self) -> Answer:
        """Fit once more; answer the time."""
        start = time.perf_counter()
        found = self.fit.run()
        seconds = time.perf_counter() - start
        del found
        return {"seconds": seconds}

    def count(self) -> Answer:
        """Answer the counts that do not depend on time."""
        moved, operations = measure.traffic(self.fit.run)
        return {
            "flop_per_batch": measure.products(self.fit.run) / self._case.batches,
            "traffic_bytes_per_batch": moved / self._case.batches,
            "operations_per_batch": operations / self._case.batches,
            "live_peak_bytes": measure.live_bytes(self.fit.run),
        }


def answered(command: Callable[[], Answer]) -> Answer:
    """Return the answer of a command, or its error."""
    try:
        return command()
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"[:500]}


def main() -> None:
    """Start, then answer commands until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer")
    parser.add_argument("case", choices=CASES)
    parser.add_argument("batches", type=int)
    parser.add_argument("truth", type=Path)
    options = parser.parse_args()
    case = dataclasses.replace(CASES[options.case], batches=options.batches)
    worker = Worker(options.peer, case, options.truth)
    # Peers print and log to standard output, which is reserved for answers.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        for command in itertools.chain(["start"], sys.stdin):
            said = answered(getattr(worker, command.strip()))
            answers.write(json.dumps(said) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
