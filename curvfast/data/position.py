"""The position of a stream of batches: counts from which it can be resumed exactly."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from curvfast.data.mixture import Document
from curvfast.errors import InputError


@dataclass(frozen=True)
class Position:
    """Position of a stream: what was yielded so far, and the rest of the last document."""

    batches: int
    sequences: int
    tokens: int
    """Real tokens of the sequences yielded."""
    documents: tuple[int, ...]
    """Documents read, by corpus."""
    document_tokens: tuple[int, ...]
    """Their tokens, by corpus."""
    rest: int
    """Tokens at the end of the last document that no sequence holds yet."""
    checksum: int
    """CRC-32 of the documents read, in order."""

    @classmethod
    def start(cls, corpora: int) -> Position:
        """Return the position before the first batch."""
        zeros = (0,) * corpora
        return cls(0, 0, 0, zeros, zeros, 0, 0)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any], corpora: int) -> Position:
        """Read what :meth:`to_dict` gave.

        Raises:
            InputError: If it does not describe a stream of so many corpora.
        """
        try:
            values: dict[str, Any] = {key: state[key] for key in cls.__dataclass_fields__}
            for key in ("documents", "document_tokens"):
                values[key] = tuple(values[key])
        except (KeyError, TypeError) as error:
            raise InputError(f"the state's position is damaged: {error!r}") from error
        position = cls(**values)
        if {len(position.documents), len(position.document_tokens)} != {corpora}:
            raise InputError("the state's position is damaged: it counts another number of corpora")
        return position

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        fields = asdict(self)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in fields.items()}


class Tally:
    """A running count of documents read."""

    def __init__(self, corpora: int) -> None:
        """Start at zero."""
        self.documents = [0] * corpora
        self.tokens = [0] * corpora
        self.checksum = 0

    def add(self, document: Document, tokens: int = 0) -> None:
        """Count a document and its tokens."""
        self.documents[document.corpus] += 1
        self.tokens[document.corpus] += tokens
        # The zero byte distinguishes "ab", "c" from "a", "bc".
        self.checksum = zlib.crc32(f"{document.text}\0".encode(), self.checksum)
