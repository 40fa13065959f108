"""Records what the launch code asks Triton's compiler for; run as a program, without a GPU.

Triton compiles a kernel anew for what it sees in the arguments: addresses and integers that 16
divides, integers that are 1. A signature written by hand may be one that never occurs. Here the
launch code itself calls the real JIT, whose driver has no device; every specialisation is noted,
and none is compiled. Writes jobs for compile_kernels.py to standard output, one line each.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from curvfast.kernels import tiling
from curvfast.ops import MomentRequest, TriangularSum
from curvfast.ops.launch import group


def recorded(launch: Callable[[], Any], arch: int) -> list[dict[str, Any]]:
    """Return a job for every kernel that ``launch`` would have compiled for an architecture."""
    jobs: list[dict[str, Any]] = []

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        jobs.append(_job(fn, compile, arch))
        return True

    with _driver(arch):
        before = triton.knobs.runtime.jit_cache_hook
        triton.knobs.runtime.jit_cache_hook = note
        try:
            launch()
        finally:
            triton.knobs.runtime.jit_cache_hook = before
    assert jobs, "nothing was launched"
    return jobs


def _job(fn: Any, found: dict[str, Any], arch: int) -> dict[str, Any]:
    names = fn.jit_function.arg_names
    types = {name: kind for name, kind in found["signature"].items() if kind != "constexpr"}
    constants = {names[path[0]]: _plain(value) for path, value in found["constants"].items()}
    aligned = [
        names[path[0]] for path, facts in found["configs"][0].items()
        if ["tt.divisibility", 16] in facts
    ]  # fmt: skip
    return {
        "module": fn.module.removeprefix("curvfast.kernels."), "kernel": fn.name, "arch": arch,
        "types": types, "constants": constants, "aligned": aligned,
        "warps": found["num_warps"], "stages": found["num_stages"],
    }  # fmt: skip


def _plain(value: Any) -> Any:
    if isinstance(value, triton.language.dtype):
        return {"bf16": "bfloat16", "fp16": "float16"}[str(value)]
    return value


@contextmanager
def _driver(arch: int) -> Iterator[None]:
    active = SimpleNamespace(
        get_current_device=lambda: arch, get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
    )  # fmt: skip
    kept, group.arch = group.arch, lambda _: arch
    triton.runtime.driver.set_active(active)
    try:
        yield
    finally:
        group.arch = kept


def grouped_jobs() -> Iterator[dict[str, Any]]:
    """The grouped launches of a step: few layers and many, of all rows and of chosen ones."""
    for arch in tiling.ARCHITECTURES:
        for members, rows in ((3, None), (32, torch.arange(0, 96, 2))):
            requests = [
                MomentRequest(
                    TriangularSum.zeros(136, tiling.TILE),
                    torch.zeros(100, 136, dtype=torch.bfloat16), rows=rows,
                )
                for _ in range(members)
            ]  # fmt: skip
            for job in recorded(lambda r=requests: group.second_moments_(r), arch):
                yield {**job, "name": f"group-{arch}-{members=}-index={rows is not None}"}


if __name__ == "__main__":
    for each in grouped_jobs():
        sys.stdout.write(json.dumps(each) + "\n")
