"""StreamConfig: the validated configuration of a stream of batches, saved with results."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from curvfast.data.mixture import EXHAUSTED
from curvfast.errors import InputError

BOUNDARIES = ("joined", "separate")


@dataclass(frozen=True)
class StreamConfig:
    """Configuration of a stream of batches, apart from its sources and tokenizer."""

    seq_len: int
    """Tokens a sequence."""
    batch_size: int
    """Sequences a batch."""
    seed: int
    """Seed of the order of files, of the buffers and of the mixture."""
    shuffle_buffer: int
    """Largest number of documents of a corpus to shuffle among; 0: the order of the sources."""
    boundaries: str
    """Whether documents are joined, or sequences end where a document does."""
    weights: tuple[float, ...] | None
    """Each corpus's share of the documents; None: the sources are one corpus."""
    exhausted: str
    """What happens when a corpus has ended."""
    shard: tuple[int, int]
    """Index and count."""
    drop_last: bool
    """Whether sequences shorter than ``seq_len`` are left out."""
    bos: bool
    """Whether each sequence begins with the tokenizer's BOS."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            InputError: If one is out of range.
        """
        if self.seq_len < 2 + self.bos:
            raise InputError(
                f"seq_len={self.seq_len}: the last token of a sequence predicts nothing, so pass "
                f"at least {2 + self.bos}; 512 is the paper's"
            )
        if self.batch_size < 1:
            raise InputError(f"batch_size={self.batch_size}: pass at least one sequence a batch")
        if self.shuffle_buffer < 0:
            raise InputError(
                f"shuffle_buffer={self.shuffle_buffer}: pass how many documents to hold, or 0 to "
                "keep the sources' order"
            )
        if self.boundaries not in BOUNDARIES:
            raise InputError(
                f"boundaries={self.boundaries!r}: pass 'joined' (documents joined by EOS and cut) "
                "or 'separate' (each sequence from one document, padded)"
            )
        if self.exhausted not in EXHAUSTED:
            raise InputError(
                f"exhausted={self.exhausted!r}: when a corpus of a mixture has ended, 'stop' ends "
                "the stream and 'continue' goes on with the others"
            )
        weights = self.weights if self.weights is not None else (1.0,)
        if not all(math.isfinite(w) and w > 0 for w in weights):
            raise InputError(f"weights={list(weights)}: every weight must be a positive number")
        index, count = self.shard
        if not 0 <= index < count:
            raise InputError(
                f"shard=({index}, {count}): pass (index, count) with 0 ≤ index < count, such as "
                "(rank, world_size)"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-able values."""
        fields = asdict(self)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in fields.items()}
