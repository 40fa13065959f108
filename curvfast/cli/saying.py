"""One line before each stage of a long command, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable


def sayer(*, quiet: bool) -> Callable[[str], None]:
    """Return what tells of a stage; with ``quiet`` it tells nothing."""

    def say(line: str) -> None:
        if not quiet:
            print(f"· {line}", file=sys.stderr, flush=True)

    return say
