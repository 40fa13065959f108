"""How cost grows with rows, features, layers, ρ and ranks: exponents fitted, the theory beside.

    python benchmarks/scaling.py            every figure, into benchmarks/results/cpu/scaling.json
    python benchmarks/scaling.py --smoke    tiny sizes, printed only

Only growth is reported: times are divided by that of the smallest size, measured in turns.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from results import CPU, environment, write
from torch import nn

import curvfast
from curvfast import Factors, LayerFactors, ops
from curvfast.core.staircase import staircase_by_mass

ROUNDS = 7
Run = Callable[[], Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, printed only")
    parser.add_argument("--out", type=Path, default=CPU / "scaling.json", help="the JSON")
    options = parser.parse_args(arguments)
    curves = [make(options.smoke) for make in (by_rows, by_features, by_layers, by_mass, by_eigh)]
    curves.append(by_ranks(options.smoke))
    for curve in curves:
        sys.stdout.write(f"{curve['name']}: {curve['exponent']} (theory {curve['theory']})\n")
    if not options.smoke:
        write(options.out, {"schema_version": 1, "environment": environment(), "curves": curves})
    return 0


def by_rows(smoke: bool) -> dict[str, Any]:
    """The second moment of 768 features."""
    d, sizes = (64, [32, 64]) if smoke else (768, [1024, 2048, 4096, 8192, 16384])
    out = ops.new_sum(d)
    data = {n: torch.randn(n, d) for n in sizes}
    runs = {n: lambda x=x: ops.second_moment_(out, x) for n, x in data.items()}
    return curve("second moment, rows", sizes, runs, theory=1.0)


def by_features(smoke: bool) -> dict[str, Any]:
    """The second moment of 2048 rows."""
    rows, sizes = (32, [96, 128]) if smoke else (2048, [256, 512, 1024, 2048, 4096])
    pairs = {d: (ops.new_sum(d), torch.randn(rows, d)) for d in sizes}
    runs = {d: lambda p=p: ops.second_moment_(*p) for d, p in pairs.items()}
    return curve("second moment, features", sizes, runs, theory=2.0)


def by_layers(smoke: bool) -> dict[str, Any]:
    """One batch through so many tracked layers of 512 features, forward and backward."""
    d, rows, sizes = (32, 16, [1, 2]) if smoke else (512, 2048, [1, 2, 4, 8, 16])
    runs = {}
    for n in sizes:
        model = nn.Sequential(*(nn.Linear(d, d) for _ in range(n)), nn.Linear(d, 8))
        batch = torch.randn(rows, d)
        names = [str(i) for i in range(n)]
        runs[n] = lambda m=model, b=batch, names=names: curvfast.collect_from(
            m, [b], lambda name, _: name in names, progress=False
        )
    return curve("collect_from, layers", sizes, runs, theory=1.0)


def by_mass(smoke: bool) -> dict[str, Any]:
    """The staircase of 4096 × 11008 by how many pairs it keeps: it should not matter."""
    shape = (64, 96) if smoke else (4096, 11008)
    g, a = (torch.arange(1, d + 1, dtype=torch.float64) ** -1.0 for d in shape)
    masses = [0.2, 0.5, 0.8, 0.95]
    pairs = [staircase_by_mass(g, a, mass).pairs for mass in masses]
    runs = {n: lambda m=m: staircase_by_mass(g, a, m) for n, m in zip(pairs, masses, strict=True)}
    found = curve("selection, pairs kept", pairs, runs, theory=0.0)
    return {**found, "masses": masses}


def by_eigh(smoke: bool) -> dict[str, Any]:
    """Both factors of a square layer decomposed."""
    sizes = [16, 32] if smoke else [128, 256, 512, 1024]
    runs = {}
    for d in sizes:
        x = torch.randn(2 * d, d, dtype=torch.float64)
        factors = Factors({"layer": LayerFactors(x.T @ x, x.T @ x, 2 * d, 2 * d)})
        runs[d] = factors.eigh
    return curve("eigendecomposition, features", sizes, runs, theory=3.0)


def by_ranks(smoke: bool) -> dict[str, Any]:
    """What each of so many processes multiplies, counted: two cores cannot time four ranks."""
    sizes, rows = [1, 2, 3, 4], 96 if smoke else 3072
    costs = []
    for ranks in sizes:
        with mp.Manager() as manager, tempfile.TemporaryDirectory() as folder:
            found = manager.dict()
            mp.spawn(_rank, (ranks, rows, f"file://{folder}/meet", found), nprocs=ranks)
            costs.append(max(found.values()))
    return summary("products of a rank, ranks", sizes, costs, theory=-1.0)


def _rank(rank: int, ranks: int, rows: int, meeting: str, found: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 8))
    batch = torch.randn(rows, 128)[rank::ranks]

    def run() -> None:
        factors = curvfast.collect_from(model, [batch], lambda name, _: name == "0", progress=False)
        assert factors.rows == rows

    found[rank] = measure.products(run)
    dist.destroy_process_group()


def curve(name: str, sizes: Sequence[int], runs: dict[int, Run], theory: float) -> dict[str, Any]:
    """Time every size in turns, and fit."""
    times: dict[int, list[float]] = {n: [] for n in sizes}
    for run in runs.values():
        run()
    for turn in range(ROUNDS):
        for n in sizes if turn % 2 == 0 else reversed(sizes):
            started = time.perf_counter()
            runs[n]()
            times[n].append(time.perf_counter() - started)
    return summary(name, sizes, [statistics.median(times[n]) for n in sizes], theory)


def summary(
    name: str, sizes: Sequence[int], costs: Sequence[float], theory: float
) -> dict[str, Any]:
    """Return a curve relative to its first point, with the slope of its logarithms."""
    relative = [cost / costs[0] for cost in costs]
    x, y = ([math.log(v) for v in values] for values in (sizes, relative))
    slope = statistics.linear_regression(x, y).slope
    return {
        "name": name, "sizes": list(sizes), "relative_cost": [round(r, 4) for r in relative],
        "exponent": round(slope, 3), "theory": theory,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
