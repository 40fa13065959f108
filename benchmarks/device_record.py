"""One run's JSON and log: written anew after every row, never over another run's."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MOST_LOG = 12 * 2**20
_MOST_OUTPUT = 256 * 2**10


class Record:
    """What is known of a run: its environment, its steps, and the rows of every case."""

    def __init__(self, folder: Path, part: str, facts: Mapping[str, Any], **more: Any) -> None:
        """Start the record of a part of the run in a folder, under a name of its own."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = _unused(folder, f"{part}-{str(facts['commit'])[:20]}")
        self.log = self.path.with_suffix(".log")
        self.results: dict[str, Any] = {"part": part, "environment": dict(facts), **more}
        self.results["steps"] = []
        self.write()

    def add(self, unit: str, found: Mapping[str, Any]) -> None:
        """Add a row to the case of a unit, and write everything."""
        case = unit.partition("/")[0]
        self.results.setdefault(case, []).append({"unit": unit, **found})
        self.write()

    def step(self, name: str, started: float) -> None:
        """Note a step that ended, and what it took."""
        took = round(time.monotonic() - started, 1)
        self.results["steps"].append({"name": name, "seconds": took})
        self.write()

    def write(self) -> None:
        """Write the JSON whole or not at all."""
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)

    def say(self, title: str, output: Path) -> str:
        """Append what a process printed to the log; return its end."""
        text = output.read_bytes()[-_MOST_OUTPUT:] if output.exists() else b""
        if not self.log.exists() or self.log.stat().st_size < _MOST_LOG:
            with self.log.open("ab") as file:
                file.write(f"==== {title}\n".encode() + text + b"\n")
        return text[-3000:].decode(errors="replace")


def _unused(folder: Path, stem: str) -> Path:
    """Make the file, so that a run beside this one takes the next name."""
    number = 1
    while True:
        path = folder / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")
        try:
            path.open("x").close()
        except FileExistsError:
            number += 1
        else:
            return path
