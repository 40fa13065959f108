"""The extensions on a GPU machine: imported if they came along, else built for its card alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_NAMES = ("_C", "_cuda")


def build(what: str) -> Iterator[dict[str, Any]]:
    """Yield which of the extensions there are, having built them where a card is at hand.

    Raises:
        ValueError: If asked for something else.
        RuntimeError: If CMake could not build them, or they cannot be imported then.
    """
    if what != "extensions":
        raise ValueError(f"there is nothing called {what!r} to build; there are the extensions")
    import torch

    missing = {name: why for name in _NAMES if (why := _refusal(name))}
    if not missing or not torch.cuda.is_available():
        yield {"missing": missing, "built": False}
        return
    code = architecture(torch.cuda.get_device_capability())
    for command in commands(code):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=_path())
        sys.stdout.write(done.stdout + done.stderr)
        if done.returncode:
            said = (done.stdout + done.stderr)[-3000:]
            raise RuntimeError(f"{command[:2]} ended with {done.returncode}:\n{said}")
    still = {name: why for name in _NAMES if (why := _refusal(name))}
    if still:
        raise RuntimeError(f"built, but not importable: {still}")
    yield {"missing": missing, "built": True, "architecture": code}


def architecture(capability: tuple[int, int]) -> str:
    """Return what CMake calls the machine code of one card, its own instructions included."""
    major, minor = capability
    return f"{major}{minor}{'a' if major >= 9 else ''}-real"


def commands(code: str) -> list[list[str]]:
    """Return how to configure and build, by as many processes as there are cores."""
    import pybind11

    folder = str(ROOT / "build" / "device")
    options = {
        "Python_EXECUTABLE": sys.executable, "pybind11_DIR": pybind11.get_cmake_dir(),
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": ROOT / "curvfast",
        "CURVFAST_CUDA_ARCHITECTURES": code,
    }  # fmt: skip
    defined = [f"-D{name}={value}" for name, value in options.items()]
    configure = ["cmake", "--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", folder, *defined]
    return [configure, ["cmake", "--build", folder, "--parallel", str(os.cpu_count() or 1)]]


def _refusal(name: str) -> str | None:
    """Return why an extension cannot be imported, asked in a process of its own, or None."""
    command = [sys.executable, "-c", f"import curvfast.{name}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_path())
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["?"])[-1]


def _path() -> dict[str, str]:
    """Return the environment with the tools beside this Python, and this checkout, found first."""
    beside = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": os.pathsep.join([beside, os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
