"""A worker whose cases go wrong in every way there is; device_steps must come through."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from device_events import serve


def measure(unit: str) -> Iterator[dict[str, Any]]:
    case, *words = unit.split("/")
    if case == "hang":
        # Deaf to being asked, and so is the process it started.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen(
            [sys.executable, "-c", "import signal, sys; print(flush=True); signal.pause()"],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        child.stdout.readline()
        yield {"processes": [os.getpid(), child.pid]}
        while True:
            signal.pause()
    if case == "crash":
        yield {"before": "the crash"}
        sys.stdout.write("about to crash\n")
        sys.stdout.flush()
        os.abort()
    if case == "wrong":
        yield {"before": "the assertion"}
        raise AssertionError(f"{words} is wrong")
    if case == "sticky":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if case == "watch":
        yield {"first": True}
        # Goes on only once the first row is on disk, under this process's eyes.
        (folder,) = Path(os.environ["WATCHED"]).glob("*.json")
        while '"first": true' not in folder.read_text(encoding="utf-8"):
            pass
    yield {"process": os.getpid()}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--events", type=Path)
    parser.add_argument("units", nargs="+")
    options = parser.parse_args()
    if options.units[0].startswith("unborn"):
        return 3
    return serve(options.units, measure, options.events, lambda error: "CUDA" in str(error))


if __name__ == "__main__":
    sys.exit(main())
