"""Reading of passages from files: the output of ``curvfast mine``, JSON lines, or text lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from curvfast.data.parts import text_of
from curvfast.data.reading import lines, plain_suffix
from curvfast.data.tokenizing import as_encoder
from curvfast.errors import InputError
from curvfast.evals.memorization import Passage

PREFIX, SUFFIX = 64, 48
MINED, MINED_VERSION = "curvfast-mined", 1
_JSON = (".json", ".jsonl", ".ndjson")


def read_passages(
    path: str | PathLike[str],
    tokenizer: Any,
    *,
    prefix: int | None = None,
    suffix: int | None = None,
    bos: bool = False,
    field: str = "text",
) -> list[Passage]:
    """Read passages as token ids.

    Args:
        path: Output of ``curvfast mine --out``; or JSON lines, each with the token ids ``prefix``
            and ``suffix`` or with a text; or text, with a passage on each line. A text is cut to
            its first tokens. Files may be compressed, as in :func:`curvfast.data.files`.
        tokenizer: The model's tokenizer: one of transformers, or a function from a text to its ids.
        prefix: Tokens of the prompt, for texts; None is the paper's 64.
        suffix: Tokens that must follow, for texts; None is the paper's 48.
        bos: Whether the prompt of a text begins with the tokenizer's BOS, which is not counted.
        field: Where a JSON line holds its text.

    Returns:
        The passages, in the order of the file.

    Raises:
        InputError: If the file cannot be read, holds no passage, or one that is too short or of
            another tokenizer; or if lengths or BOS are given for passages that are cut already.
    """
    if any(length is not None and length < 1 for length in (prefix, suffix)):
        raise InputError(f"prefix={prefix}, suffix={suffix}: pass at least 1 token of each")
    encoder = as_encoder(tokenizer)
    if bos and encoder.bos is None:
        raise InputError(f"bos=True, and the tokenizer ({encoder.name}) has no BOS; leave it out")
    head, tail = prefix or PREFIX, suffix or SUFFIX
    opening = (encoder.bos,) if bos and encoder.bos is not None else ()
    found = []
    for where, row in _rows(Path(path)):
        if isinstance(row, dict) and {"prefix", "suffix"} <= row.keys():
            if prefix is not None or suffix is not None or bos:
                raise InputError(
                    f"{where} is cut already, into token ids: leave out prefix=, suffix= and bos="
                )
            found.append(_given(row, tokenizer, encoder.vocabulary, where))
            continue
        text = text_of(row, field, where)
        if not text or text.isspace():
            continue
        ids = encoder.encode([text])[0]
        if len(ids) < head + tail:
            raise InputError(
                f"{where} has {len(ids)} tokens, and a passage takes {head} + {tail}: leave it "
                "out, or pass a smaller prefix= or suffix="
            )
        found.append(Passage((*opening, *ids[:head]), tuple(ids[head : head + tail])))
    if not found:
        raise InputError(f"{str(path)!r} holds no passage; see curvfast mine --out")
    return found


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a file and their places, for messages."""
    name = str(path)
    if plain_suffix(path) not in _JSON:
        for number, line in enumerate(lines(path), 1):
            yield f"line {number} of {name!r}", line.rstrip("\r\n")
        return
    whole = "".join(lines(path))
    try:
        value = json.loads(whole)
    except ValueError:
        value = None
    if isinstance(value, dict) and value.get("kind") == MINED:
        if value.get("format_version") != MINED_VERSION:
            raise InputError(
                f"{name!r} is of version {value.get('format_version')} of what curvfast mine "
                f"writes; this curvfast reads {MINED_VERSION}"
            )
        for number, entry in enumerate(value.get("passages", ()), 1):
            yield f"passage {number} of {name!r}", entry
        return
    for number, line in enumerate(whole.split("\n"), 1):
        if not line or line.isspace():
            continue
        where = f"row {number} of {name!r}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(
                f"{where} is not JSON ({error}): pass what curvfast mine --out wrote, or one "
                "object a line"
            ) from error
        yield where, row


def _given(row: dict[str, Any], tokenizer: Any, vocabulary: int | None, where: str) -> Passage:
    """Return a passage of token ids, which must be those of the tokenizer."""
    parts = {key: row[key] for key in ("prefix", "suffix")}
    for key, ids in parts.items():
        if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
            raise InputError(
                f"{key!r} of {where} is no list of token ids; pass ids, or the whole passage as "
                "'text'"
            )
        told = row.get(f"{key}_text")
        if not _fits(ids, told, tokenizer, vocabulary):
            raise InputError(
                f"{key!r} of {where} was not made by this model's tokenizer: mine the passages "
                "with this model, or pass their texts"
            )
    return Passage(tuple(parts["prefix"]), tuple(parts["suffix"]))


def _fits(ids: Sequence[int], told: Any, tokenizer: Any, vocabulary: int | None) -> bool:
    if min(ids) < 0 or (vocabulary is not None and max(ids) >= vocabulary):
        return False
    decode = getattr(tokenizer, "decode", None)
    return told is None or decode is None or decode(ids) == told
