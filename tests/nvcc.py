"""The CUDA compiler, where there is one that knows every generation that is built for."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

NVCC = shutil.which("nvcc")
GENERATIONS = ("sm_80", "sm_90a", "sm_100")
_FIRST = (12, 8)


def _release() -> tuple[int, ...]:
    if NVCC is None:
        return ()
    said = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(map(int, re.search(r"release (\d+)\.(\d+)", said).groups()))


needs_nvcc = pytest.mark.skipif(_release() < _FIRST, reason="needs nvcc 12.8 or later")
