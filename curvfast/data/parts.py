"""The parts of a corpus: files and iterables, each read lazily, document by document."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from curvfast.data.reading import file_facts, lines
from curvfast.errors import InputError

SPLITS = ("file", "block", "line")
# Longer than any book; a tokenizer takes some hundred bytes a character.
_LONGEST = 1 << 26


class CorpusPart(Protocol):
    """A file or an iterable. Records are decoded separately: a rank decodes only its own."""

    def records(self) -> Iterator[Any]:
        """Yield the undecoded documents in the order of the part."""

    def text(self, record: Any, row: int) -> str:
        """Decode record number ``row``, counted from 1; an empty string is no document."""

    def name(self) -> str:
        """Return a name that identifies the part, independent of its location."""

    def size(self) -> int | None:
        """Return bytes, or None if it is no file."""

    def facts(self) -> dict[str, Any]:
        """Return the part's provenance, JSON-able."""


@dataclass(frozen=True)
class _File:
    """Common properties of files."""

    path: Path

    def name(self) -> str:
        """Return the file's name: the folder may have moved."""
        return self.path.name

    def size(self) -> int:
        """Return bytes."""
        return self.path.stat().st_size


@dataclass(frozen=True)
class TextFile(_File):
    """A text file: one document, one per block between blank lines, or one per line."""

    split: str

    def records(self) -> Iterator[str]:
        """Yield the documents.

        Raises:
            InputError: If the file cannot be read, or a document is too long to hold in memory.
        """
        if self.split == "line":
            yield from (line.rstrip("\n") for line in lines(self.path))
            return
        blocks = self.split == "block"
        for blank, group in groupby(lines(self.path), lambda line: blocks and line.isspace()):
            if not blank:
                text = self._joined(group)
                yield text.rstrip("\n") if blocks else text

    def text(self, record: str, row: int) -> str:
        """Return the record, which is text."""
        return record

    def facts(self) -> dict[str, Any]:
        """Return path, size and hash or time, and what a document is."""
        return {**file_facts(self.path), "split": self.split}

    def _joined(self, group: Iterable[str]) -> str:
        held: list[str] = []
        length = 0
        for line in group:
            held.append(line)
            length += len(line)
            if length > _LONGEST:
                raise InputError(
                    f"{str(self.path)!r} holds a document of more than {_LONGEST:,} characters, "
                    f"which would be held in memory whole: it is split by {self.split!r}; pass "
                    "split='block' or split='line' for smaller documents"
                )
        return "".join(held)


@dataclass(frozen=True)
class JsonFile(_File):
    """A file of JSON lines: one object per line, its text in one field."""

    field: str

    def records(self) -> Iterator[str]:
        """Yield the lines.

        Raises:
            InputError: If the file cannot be read.
        """
        return lines(self.path)

    def text(self, record: str, row: int) -> str:
        """Decode a line.

        Raises:
            InputError: If it is not JSON or has no such field.
        """
        where = f"row {row} of {str(self.path)!r}"
        if record.isspace():
            return ""
        try:
            value = json.loads(record)
        except ValueError as error:
            raise InputError(
                f"{where} is not JSON ({error}); a .json or .jsonl file must hold one object a line"
            ) from error
        return text_of(value, self.field, where)

    def facts(self) -> dict[str, Any]:
        """Return path, size and hash or time, and the field."""
        return {**file_facts(self.path), "field": self.field}


@dataclass(frozen=True, eq=False)
class IterableRows:
    """Any iterable of strings or of dict rows, such as a ``datasets.Dataset``."""

    rows: Iterable[Any]
    field: str
    title: str

    def records(self) -> Iterator[Any]:
        """Yield the rows."""
        return iter(self.rows)

    def text(self, record: Any, row: int) -> str:
        """Take the text out of a row.

        Raises:
            InputError: If it has no such field.
        """
        return text_of(record, self.field, f"row {row} of {self.title}")

    def name(self) -> str:
        """Return the title, with the length where there is one."""
        length = self._length()
        return self.title if length is None else f"{self.title} of {length} rows"

    def size(self) -> None:
        """Return None: it is no file."""

    def facts(self) -> dict[str, Any]:
        """Return name, field and length, and the fingerprint of a ``datasets.Dataset``."""
        facts = {"rows": self.title, "field": self.field, "length": self._length()}
        fingerprint = getattr(self.rows, "_fingerprint", None)
        return {**facts, "fingerprint": fingerprint} if isinstance(fingerprint, str) else facts

    def _length(self) -> int | None:
        try:
            return len(self.rows)  # type: ignore[arg-type]
        except TypeError:
            return None


def text_of(row: Any, field: str, where: str) -> str:
    """Return the text of a string or of a dict row; a null is an empty text.

    Raises:
        InputError: If the row is neither, or its field is missing or holds no text.
    """
    if isinstance(row, str):
        return row
    if not isinstance(row, Mapping):
        raise InputError(
            f"{where} is a {type(row).__name__}; a row is a string or a dict with a field {field!r}"
        )
    if field not in row:
        there = ", ".join(map(repr, row)) or "none"
        raise InputError(f"{where} has no field {field!r}; its fields: {there}. Pass field=")
    text = row[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InputError(
            f"field {field!r} of {where} is a {type(text).__name__}, not text; pass field="
        )
    return text
