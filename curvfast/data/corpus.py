"""Corpora: parts that are read as one; a mixture has one weight per corpus."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from curvfast.data.parts import SPLITS, CorpusPart, IterableRows, JsonFile, TextFile
from curvfast.data.reading import decompressor, plain_suffix
from curvfast.errors import InputError

_JSON = (".json", ".jsonl", ".ndjson")
_NOT_TEXT = (".arrow", ".bin", ".csv", ".npy", ".parquet", ".pt", ".tar", ".tsv", ".zip")
_LISTED = 100


@dataclass(frozen=True)
class Corpus:
    """Documents from files or an iterable, streamed; made by :func:`files` and :func:`rows`."""

    parts: tuple[CorpusPart, ...]

    def documents(self, number: int, shard: tuple[int, int]) -> Iterator[str]:
        """Yield the documents of one part that belong to a shard.

        Record r of part p belongs to shard (p + r) mod count, whatever the order of parts: shards
        are disjoint and together complete even if their seeds differ.

        Args:
            number: Index of the part.
            shard: Index and count.

        Yields:
            Texts that are not blank.

        Raises:
            InputError: If the part cannot be read.
        """
        index, count = shard
        part = self.parts[number]
        for row, record in enumerate(part.records(), 1):
            if (number + row) % count == index:
                text = part.text(record, row)
                if text and not text.isspace():
                    yield _encodable(text)

    @property
    def name(self) -> str:
        """Name of the corpus in messages."""
        first = self.parts[0].name()
        return repr(first) if len(self.parts) == 1 else f"{first!r} and {len(self.parts) - 1} more"

    def digest(self) -> str:
        """Return a hash of every part's name and size."""
        whole = json.dumps([[part.name(), part.size()] for part in self.parts])
        return hashlib.sha256(whole.encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """Return the number of parts, and the provenance of the first hundred."""
        listed = [part.facts() for part in self.parts[:_LISTED]]
        return {"part_count": len(self.parts), "parts": listed}


def files(*paths: str | PathLike[str], field: str = "text", split: str = "file") -> Corpus:
    """Make a corpus of text files and JSON lines.

    Args:
        paths: Files, or globs such as ``"web/**/*.jsonl.gz"``, each glob in alphabetical order.
            ``.json``, ``.jsonl`` and ``.ndjson`` hold one JSON object a line, anything else is
            text; ``.gz``, ``.bz2`` and ``.xz`` are decompressed, and ``.zst`` from Python 3.14 on.
        field: Where a JSON object holds its text.
        split: What a document of a text file is: ``"file"``, all of it; ``"block"``, what stands
            between blank lines; ``"line"``.

    Returns:
        The corpus; a file named twice is read once.

    Raises:
        InputError: If there is no such file, or not of a kind that can be read.
    """
    if split not in SPLITS:
        raise InputError(f"split={split!r}: pass 'file', 'block' (between blank lines) or 'line'")
    found = dict.fromkeys(path for given in paths for path in _expanded(fspath(given)))
    if not found:
        raise InputError("no file was named; pass paths or globs")
    return Corpus(tuple(_part(path, field, split) for path in found))


def rows(iterable: Iterable[Any], *, field: str = "text", name: str | None = None) -> Corpus:
    """Make a corpus of an iterable: strings, or dict rows as of a ``datasets.Dataset``.

    Args:
        iterable: Read lazily and in order; anew by each pass, so an iterator serves one only.
        field: Where a dict row holds its text.
        name: For messages and provenance; the type's name if None.

    Returns:
        The corpus.

    Raises:
        InputError: If it is not an iterable of rows.
    """
    if isinstance(iterable, (str, bytes, Mapping)) or not hasattr(iterable, "__iter__"):
        raise InputError(
            f"rows of a {type(iterable).__name__}: pass an iterable of strings or dict rows; of a "
            "DatasetDict pass one split, such as dataset['train']"
        )
    return Corpus((IterableRows(iterable, field, name or type(iterable).__name__),))


def corpora(sources: Any, field: str, split: str) -> list[Corpus]:
    """Read the ``sources`` of :func:`curvfast.data.text_batches`, one corpus each.

    Raises:
        InputError: If one is none, or it is unclear whether strings are paths or texts.
    """
    if not isinstance(sources, (list, tuple)):
        return [_corpus(sources, field, split)]
    if not sources:
        raise InputError("sources is empty; pass paths, globs, datasets, or curvfast.data.rows(..)")
    return [_corpus(source, field, split) for source in sources]


def merged(parts: Sequence[Corpus]) -> Corpus:
    """Join corpora to one; a file in several is read once."""
    return Corpus(tuple(dict.fromkeys(part for corpus in parts for part in corpus.parts)))


def _corpus(source: Any, field: str, split: str) -> Corpus:
    if isinstance(source, Corpus):
        return source
    if isinstance(source, (str, PathLike)):
        return files(source, field=field, split=split)
    if isinstance(source, (list, tuple, Mapping)):
        raise InputError(
            f"a source is a {type(source).__name__}, which may mean paths or rows: pass "
            "curvfast.data.files(*paths) or curvfast.data.rows(rows); of a DatasetDict one split, "
            "such as dataset['train']"
        )
    return rows(source, field=field)


def _expanded(given: str) -> list[Path]:
    path = Path(given)
    if path.is_file():
        return [path]
    if path.is_dir():
        raise InputError(f"{given!r} is a folder; pass a glob, such as {given.rstrip('/')}/*.jsonl")
    found = sorted(glob.glob(given, recursive=True))
    chosen = [Path(name) for name in found if Path(name).is_file()]
    if not chosen:
        shown = given if len(given) <= 80 else f"{given[:80]}…"
        raise InputError(
            f"no file {shown!r} (seen from {str(Path.cwd())!r}): strings are paths or globs. "
            "Pass texts as curvfast.data.rows(texts)"
        )
    return chosen


def _part(path: Path, field: str, split: str) -> CorpusPart:
    kind = plain_suffix(path)
    if kind in _NOT_TEXT:
        raise InputError(
            f"{str(path)!r} is not read here: load {kind} files with datasets.load_dataset and "
            "pass the Dataset"
        )
    decompressor(path)
    return JsonFile(path, field) if kind in _JSON else TextFile(path, split)


def _encodable(text: str) -> str:
    """Replace lone surrogates, which JSON can hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
