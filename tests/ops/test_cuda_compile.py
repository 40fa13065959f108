"""The CUDA core compiles for GPUs that are not here, without a spilled register.

What it computes, tests/ops/triangle_fuzz.cpp tests on the CPU.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from nvcc import GENERATIONS, NVCC, needs_nvcc

CSRC = Path(__file__).parents[2] / "csrc"
# pack, unpack, mirror and scale, of float and of double.
KERNELS = 8


@needs_nvcc
def test_no_kernel_uses_local_memory(tmp_path: Path) -> None:
    codes = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in GENERATIONS]
    done = subprocess.run(
        [
            NVCC, "-std=c++20", "-O3", *codes, "-Xptxas=-v", "-c", CSRC / "triangle.cu",
            "-o", tmp_path / "triangle.o",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    compiled = done.stderr.split("Compiling entry function")[1:]
    for arch in GENERATIONS:
        kernels = [text for text in compiled if f"for '{arch}'" in text]
        assert len(kernels) == KERNELS, arch
        for text in kernels:
            unused = re.search(r"(\d+) bytes stack frame, (\d+) .* stores, (\d+) .* loads", text)
            assert unused.groups() == ("0", "0", "0"), text
            # Eight blocks of 256 threads share the 65,536 registers of a multiprocessor; six must.
            assert int(re.search(r"Used (\d+) registers", text)[1]) <= 40, text
