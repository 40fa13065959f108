"""Profile of ``collect_from`` and ``edit``: time in products, and in everything else.

    python benchmarks/profile_parts.py --label after     into benchmarks/results/cpu/profile.json

Self time of torch's operations by torch's profiler, and of the native core by its own record; the
rest is Python. The file keeps the figures of every label.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peers.cases import CASES
from results import CPU, environment, write
from torch.profiler import ProfilerActivity, profile, record_function

import curvfast
from curvfast.ops.native import extension

NATIVE = "curvfast second moment"
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", NATIVE)
ATTENTION = "scaled_dot_product"
DRAWING = ("aten::exponential_", "aten::uniform_", "aten::cumsum", "aten::cumsum_", "aten::argmax")
COPIES = ("aten::index_select", "aten::index", "aten::copy_", "aten::cat", "aten::clone")
ROUNDS = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--label", default="after")
    parser.add_argument("--case", choices=CASES, default="wide")
    parser.add_argument("--out", type=Path, default=CPU / "profile.json", help="the JSON")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore", curvfast.NumericalWarning)
    for name in ("add_rows", "add_bfloat16_rows"):
        if hasattr(extension, name):
            setattr(extension, name, _recorded(getattr(extension, name)))
    case = CASES[options.case]
    model, batches = case.model(), case.data(4)
    layers = [n.replace(".weight", "") for n in case.names(model)]
    basis = curvfast.collect_from(model, batches[:1], layers, progress=False).eigh()
    parts = {
        "collect_from": shares(
            lambda: curvfast.collect_from(model, batches, layers, progress=False)
        ),
        "edit": shares(lambda: _edit(model, basis)),
    }
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    results = {**results, "schema_version": 1, "environment": environment()}
    results.setdefault("runs", {})[options.label] = parts
    write(options.out, results)
    sys.stdout.write(f"{json.dumps(parts, indent=1)}\n")
    return 0


def _edit(model: Any, basis: curvfast.Eigenbasis) -> None:
    with curvfast.edited(model, basis, mass=0.6):
        pass


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        with record_function(NATIVE):
            return function(*arguments)

    return run


def shares(run: Callable[[], Any]) -> dict[str, float]:
    """Return the median shares of the wall time that kinds of work take."""
    run()
    found = [_once(run) for _ in range(ROUNDS)]
    return {key: round(statistics.median(one[key] for one in found), 4) for key in found[0]}


def _once(run: Callable[[], Any]) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        started = time.perf_counter()
        run()
        wall = 1e6 * (time.perf_counter() - started)
    own = {event.key: event.self_cpu_time_total for event in recorded.key_averages()}
    products = sum(own.get(key, 0.0) for key in PRODUCTS)
    attention = sum(time for key, time in own.items() if ATTENTION in key)
    drawing, copies = (sum(own.get(k, 0.0) for k in kind) for kind in (DRAWING, COPIES))
    other = sum(own.values()) - products - attention - drawing - copies
    spent = {
        "products": products, "attention": attention, "drawing": drawing, "copies": copies,
        "elementwise": other, "python": wall - sum(own.values()),
    }  # fmt: skip
    return {"seconds": wall / 1e6, **{kind: part / wall for kind, part in spent.items()}}


if __name__ == "__main__":
    sys.exit(main())
