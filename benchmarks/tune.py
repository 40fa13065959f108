"""Measures every tiling of whole rows on this GPU and prints the rates for kernels/src/tiling.py.

    python benchmarks/tune.py [--dry-run]

Each line gives what the wave model predicted and what was measured: where they differ by much, it
is the model that has to be mended. A tiling that does not fit ends itself alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ROWS = 16_384
WIDTHS = (768, 2048, 4096, 8192, 14336)


def tune(rows: str, d: str) -> Iterator[dict[str, Any]]:
    """Measure each tiling of one shape; the rate of a row is what the model's table wants."""
    import torch
    from gpu import sticky
    from gpu_timing import DEVICE, REAL, timings

    from curvfast import ops
    from curvfast.kernels import tiling
    from curvfast.ops import TriangularSum
    from curvfast.ops.launch import moments

    arch = tiling.architecture(torch.cuda.get_device_capability()) if REAL else 90
    x = torch.randn(int(rows), int(d), device=DEVICE).bfloat16()
    out = TriangularSum.zeros(int(d), tiling.TILE if REAL else 32, device=DEVICE)
    request = ops.MomentRequest(out, x)
    for candidate in _candidates(tiling, int(d), REAL):
        row = {"arch": arch, "rows": int(rows), "d": int(d), **asdict(candidate)}
        kept = tiling.whole_rows, tiling.interpreted
        tiling.whole_rows = lambda *_, c=candidate: c
        tiling.interpreted = lambda *_, c=candidate, **__: c
        try:
            with ops.use_backend("triton"):
                found = timings({"ours": lambda: moments.second_moment_(request)})["ours"]
        except Exception as error:
            if sticky(error):
                raise
            yield {**row, "error": f"{type(error).__name__}: {error}"[:300]}
            continue
        finally:
            tiling.whole_rows, tiling.interpreted = kept
        model = 1e3 * tiling.seconds(candidate, int(d), int(rows), arch)
        # What whole waves would do at this time is the rate the model wants.
        rate = model * tiling._RATES[arch, candidate.paired] / found.ms
        yield {**row, "model_ms": model, "ms": found.ms, "rate": rate}


def main() -> int:
    dry_run = "--dry-run" in sys.argv[1:]
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    from gpu_timing import REAL

    if not REAL and not dry_run:
        sys.stderr.write("no CUDA device here: pass --dry-run to exercise the host side\n")
        return 2
    best: dict[tuple[int, bool], float] = {}
    for d in WIDTHS if REAL else (40,):
        for row in tune(str(ROWS if REAL else 64), str(d)):
            sys.stdout.write(f"{row}\n")
            if "rate" in row:
                key = row["arch"], row["paired"]
                best[key] = max(best.get(key, 0.0), row["rate"])
    for (arch, paired), rate in best.items():
        sys.stdout.write(f"    ({arch}, {paired}): {rate / 1e12:.0f}e12,\n")
    return 0


def _candidates(tiling: Any, d: int, real: bool) -> list[Any]:
    if not real:
        return [tiling.interpreted(0, paired=paired) for paired in (False, True)]
    bases = [
        tiling.Tiling(64, warps, stages, paired=paired)
        for paired, warps, stages in (
            (False, 8, 4), (False, 8, 3), (False, 4, 4), (True, 8, 4), (True, 8, 3),
        )
    ]  # fmt: skip
    splits = (1, 2, 4, 8, 16) if d < 3000 else (1, 2)
    return [replace(base, splits=s) for base in bases for s in splits]


if __name__ == "__main__":
    sys.exit(main())
