"""Measures some units on a GPU in this process, and tells every row at once.

    python benchmarks/gpu.py second_moment/bfloat16/16384/4096 check/grouped
    python benchmarks/gpu.py --dry-run second_moment/bfloat16/96/40

A unit is a case and its sizes; ``device.sh`` runs them all, in processes of their own.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
Row = Mapping[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("units", nargs="+", metavar="CASE/SIZE...", help="what to measure")
    parser.add_argument("--dry-run", action="store_true", help="under Triton's interpreter")
    parser.add_argument("--events", type=Path, default=Path("/dev/stdout"), help="where to tell")
    options = parser.parse_args()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["CURVFAST_BACKEND"] = "triton"
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    import torch
    from device_events import serve

    if not options.dry_run and not torch.cuda.is_available():
        sys.stderr.write("no CUDA device here: pass --dry-run to exercise the host side\n")
        return 2
    if options.dry_run:
        torch.set_num_threads(2)
    return serve(options.units, measure, options.events, sticky)


def measure(unit: str) -> Iterable[Row]:
    """Return the rows of a unit."""
    case, *words = unit.split("/")
    return _case(case)(*words)


def sticky(error: BaseException) -> bool:
    """Return whether an error is one after which every call of CUDA in this process fails."""
    text = f"{type(error).__name__}: {error}"
    return any(
        sign in text for sign in ("CUDA error", "illegal memory access", "CUDA driver error")
    )


def _case(name: str) -> Callable[..., Iterable[Row]]:
    if name == "device":
        return device
    if name == "warm":
        return warm
    if name == "build":
        from device_build import build

        return build
    if name == "tests":
        from gpu_tests import run_tests

        return run_tests
    if name == "check":
        from gpu_checks import check

        return check
    if name == "tune":
        from tune import tune

        return tune
    import gpu_cases

    if name in gpu_cases.RACES:
        return lambda *words: [gpu_cases.raced(gpu_cases.RACES[name](*words))]
    if name in gpu_cases.OTHERS:
        return gpu_cases.OTHERS[name]
    known = ", ".join(["build", "check", "device", "tests", "tune", "warm", *gpu_cases.RACES])
    raise ValueError(f"there is no case {name!r}; there are {known}, {', '.join(gpu_cases.OTHERS)}")


def device() -> Iterator[Row]:
    """Yield what only the device itself and its libraries can tell."""
    import torch
    import triton

    row: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__}
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        row |= {
            "name": found.name, "multiprocessors": found.multi_processor_count,
            "bytes": found.total_memory, "capability": [found.major, found.minor],
            "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        }  # fmt: skip
    yield row


def warm(case: str, *words: str) -> Iterator[Row]:
    """Compile what a race of ours launches, running none of it, into Triton's cache."""
    from gpu_cases import RACES, training

    import curvfast

    started = time.perf_counter()
    with compile_only():
        if case == "end_to_end":
            model, _, step = training(*words)
            with curvfast.collect(model, "all"):
                step()
        else:
            for call in RACES[case](*words).ours.values():
                call()
    yield {"seconds": time.perf_counter() - started}


@contextmanager
def compile_only() -> Iterator[None]:
    """Let every launch compile its kernel and stop there; the interpreter has none to compile."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compiled
    try:
        yield
    finally:
        JITFunction.run = run


if __name__ == "__main__":
    sys.exit(main())
