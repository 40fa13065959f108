"""Runs a part of the GPU's plan within its seconds; ``device.sh`` starts it. No torch in here.

Exits with 1 if a unit failed, 0 otherwise; what was not reached is told in the JSON.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from device_plan import steps
from device_record import Record
from device_steps import Run

ROOT = Path(__file__).parents[1]
_PACKAGES = ("torch", "triton", "numpy", "transformers", "pytest", "pytest-xdist")
_TOOLS = ("nvidia-smi", "nvcc", "gcc", "cmake", "ninja", "make", "compute-sanitizer", "git")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("A", "B"))
    parser.add_argument("--out", type=Path, help="folder of the JSON (benchmarks/results/<gpu>)")
    parser.add_argument("--seconds", type=float, default=285, help="the run's own clock (285)")
    parser.add_argument("--dry-run", action="store_true", help="small, interpreted, without a GPU")
    options = parser.parse_args()
    # Asked to end, end what was started too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    facts = environment()
    if not options.dry_run and not facts["gpu"]:
        sys.stderr.write("no CUDA device here: pass --dry-run to exercise the host side\n")
        return 2
    folder = options.out or ROOT / "benchmarks" / "results" / (
        "dry-run" if options.dry_run else _slug(facts["gpu"])
    )
    record = Record(folder, options.part, facts, dry_run=options.dry_run)
    worker = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]
    worker += ["--dry-run"] if options.dry_run else []
    run = Run(record, worker, options.seconds)
    run.run(steps(options.part, options.dry_run, lambda: run.failed))
    sys.stdout.write(f"{record.path}: {len(run.passed)} passed, failed: {sorted(run.failed)}\n")
    return 1 if run.failed else 0


def environment() -> dict[str, Any]:
    """Return what the figures depend on beside the code, as far as it is known without torch."""
    ask = "name,driver_version,clocks.sm,clocks.mem,power.limit,compute_cap"
    cards = said(["nvidia-smi", f"--query-gpu={ask}", "--format=csv,noheader"])
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(), "gpu": cards.split(",")[0].strip(), "nvidia_smi": cards,
        "python": platform.python_version(), "cores": os.cpu_count(),
        **{name: _version(name) for name in _PACKAGES},
        "tools": [tool for tool in _TOOLS if shutil.which(tool)],
    }  # fmt: skip


def commit() -> str:
    """Return what CURVFAST_COMMIT says, else what git says, else "unknown"."""
    given = re.sub(r"[^A-Za-z0-9._-]", "", os.environ.get("CURVFAST_COMMIT", ""))
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    return given or said(asked) or "unknown"


def said(command: list[str]) -> str:
    """Return what a command prints, or "" if it is not there, fails, or takes long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
