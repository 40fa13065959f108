"""Continuations of passages before and after an edit, as JSON and as report blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from os import PathLike
from typing import Any

from curvfast.errors import FormatError, InputError
from curvfast.report.document import Piece, Recital
from curvfast.storage import write_json
from curvfast.storage.jsonl import require_version

KIND = "curvfast-passages"
VERSION = 1
FILE = "passages.json"


@dataclass(frozen=True)
class Continuation:
    """One passage with its continuations, as text."""

    prompt: str
    truth: str
    """The true continuation."""
    before: str
    """The unedited model's continuation."""
    after: str
    """The edited model's continuation."""


def save_passages(
    path: str | PathLike[str], passages: Sequence[Continuation], *, chosen: str = ""
) -> None:
    """Write continuations as JSON, for a report to show side by side.

    Args:
        path: The file.
        passages: At least one.
        chosen: How these were chosen, and of how many, so that readers are not misled.

    Raises:
        InputError: If there is none.
    """
    if not passages:
        raise InputError("there is no passage to be saved: pass some")
    entries = [asdict(passage) for passage in passages]
    write_json(path, {"kind": KIND, "version": VERSION, "chosen": chosen, "passages": entries})


def read_passages(content: Mapping[str, Any]) -> tuple[list[Continuation], str]:
    """Read continuations that :func:`save_passages` wrote, and how they were chosen.

    Args:
        content: The file's JSON.

    Raises:
        FormatError: If it is of a newer version, or damaged.
    """
    require_version(content, KIND, VERSION)
    try:
        passages = [Continuation(**entry) for entry in content["passages"]]
        chosen = content["chosen"]
    except (KeyError, TypeError) as error:
        raise FormatError(f"damaged: {error!r}; run again what wrote it") from error
    if not all(isinstance(text, str) for p in passages for text in asdict(p).values()):
        raise FormatError("damaged: a passage holds something other than text")
    return passages, str(chosen)


def recital(passage: Continuation) -> Recital:
    """Return a passage with words marked that differ from the true text."""
    return Recital(
        passage.prompt,
        passage.truth,
        marked(passage.truth, passage.before),
        marked(passage.truth, passage.after),
    )


def marked(truth: str, said: str) -> tuple[Piece, ...]:
    """Split a continuation into runs of words that agree or differ from the true text.

    Words are aligned as by an edit distance, so that after an omitted word the rest still agrees.

    Args:
        truth: The true continuation.
        said: A model's continuation.

    Returns:
        Runs whose concatenation is ``said``.
    """
    true, own = _words(truth), _words(said)
    same = SequenceMatcher(None, [w.strip() for w in true], [w.strip() for w in own], False)
    pieces, start = [], 0
    for block in same.get_matching_blocks():
        other = "".join(own[start : block.b])
        words = other.lstrip()
        pieces.append(Piece(other[: len(other) - len(words)], False))
        pieces.append(Piece(words, True))
        pieces.append(Piece("".join(own[block.b : block.b + block.size]), False))
        start = block.b + block.size
    return tuple(piece for piece in pieces if piece.text)


def _words(text: str) -> list[str]:
    """Return the words, each with the space before it."""
    return re.findall(r"\s*\S+|\s+$", text)
