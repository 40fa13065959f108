"""Progress messages of long commands on standard error, one line before each stage."""

from __future__ import annotations

import sys
from collections.abc import Callable


def stage_reporter(*, quiet: bool) -> Callable[[str], None]:
    """Return a function that prints a stage's line; with ``quiet`` it prints nothing."""

    def report_stage(line: str) -> None:
        if not quiet:
            print(f"· {line}", file=sys.stderr, flush=True)

    return report_stage
