"""How a worker tells what it measures, line by line, so that nothing measured is lost with it.

A worker is given units, each a case and its arguments: ``second_moment/bfloat16/16384/4096``. For
each it says when it begins, every row as soon as it is there, a failure, and when it ends.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

STICKY = 75
"""Exit code of a worker whose process cannot go on, though the rest of its units can in another."""
_MOST_TEXT = 20_000


def serve(
    units: Sequence[str],
    measure: Callable[[str], Iterable[Mapping[str, Any]]],
    path: Path,
    sticky: Callable[[BaseException], bool],
) -> int:
    """Measure units one after the other, telling all of it to a file; return the exit code.

    Args:
        units: What to measure.
        measure: Returns the rows of a unit.
        path: Where to tell it.
        sticky: Whether an error leaves the process unable to go on, as those of CUDA do.
    """
    with path.open("a", encoding="utf-8") as file:

        def tell(**event: Any) -> None:
            file.write(json.dumps(event, default=str) + "\n")
            file.flush()

        for unit in units:
            tell(begin=unit)
            try:
                for row in measure(unit):
                    tell(unit=unit, row=row)
            except Exception as error:
                tell(unit=unit, failed=traceback.format_exc()[-_MOST_TEXT:])
                if sticky(error):
                    tell(end=unit)
                    return STICKY
            tell(end=unit)
    return 0


class Told:
    """What a worker told so far, read as it comes."""

    def __init__(self, path: Path) -> None:
        """Read from a file that need not exist yet."""
        self._path = path
        self._read = 0

    def events(self) -> list[dict[str, Any]]:
        """Return the events that are new; a line half written waits for its other half."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._read)
            whole = file.read().rpartition(b"\n")[0]
        self._read += len(whole) + 1 if whole else 0
        return [json.loads(line) for line in whole.splitlines()]
