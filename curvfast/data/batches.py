"""text_batches(): deterministic batches of tokens from files, iterables or datasets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from os import PathLike
from typing import Any

from torch import Tensor

from curvfast.data.corpus import Corpus, corpora, merged
from curvfast.data.mixture import Document
from curvfast.data.packing import collate, pack_sequences
from curvfast.data.position import Position, Tally
from curvfast.data.settings import StreamConfig
from curvfast.data.stream import documents
from curvfast.data.tokenizing import Encoder, as_encoder
from curvfast.errors import InputError

STATE_VERSION = 1


def text_batches(
    sources: str | PathLike[str] | Corpus | Iterable[Any],
    tokenizer: Any,
    *,
    seq_len: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    shuffle_buffer: int = 10_000,
    boundaries: str = "joined",
    weights: Sequence[float] | None = None,
    exhausted: str = "stop",
    shard: tuple[int, int] = (0, 1),
    field: str = "text",
    split: str = "file",
    drop_last: bool = False,
    bos: bool = False,
    eos: int | None = None,
) -> TokenBatches:
    """Stream text as batches of tokens, for :func:`curvfast.collect_from`.

    Sources are read lazily: what is held is the shuffle's buffers and some documents more. The
    same arguments give the same batches, and the global random state is untouched.

    Args:
        sources: A path or glob of text or JSON lines (as :func:`files` takes them), an iterable of
            strings or dict rows (a ``datasets.Dataset`` or ``IterableDataset``), or what
            :func:`files` and :func:`rows` return; or a list of these. Strings are paths, never
            texts.
        tokenizer: One of transformers, or a function from a text to its token ids.
        seq_len: Tokens a sequence, at least 2.
        batch_size: Sequences a batch.
        seed: Seed of everything that is shuffled or drawn.
        shuffle_buffer: Most documents held, for each corpus, to draw the next one from; fewer where
            documents are very long. Files are then read in random order, sixteen at a time in
            proportion to their bytes. 0 keeps the sources' order.
        boundaries: ``"joined"`` sets an EOS after each document, joins them and cuts, as in the
            paper: sequences are full, and most hold parts of several documents. ``"separate"`` cuts
            each document by itself: no sequence holds tokens of two, and short ones are padded.
        weights: None reads all sources as one corpus. Else one weight per source, each then a
            separate corpus: its share of the *documents*; tokens follow the documents' lengths,
            and ``provenance()`` counts them.
        exhausted: When a corpus with weight has ended: ``"stop"`` ends the stream, so that shares
            are right to its end; ``"continue"`` goes on with the others until all have ended.
        shard: (index, count), such as rank and world size. Shards are disjoint and, where every
            corpus is read to its end, together everything. They are of documents, and uneven.
        field: Where dict rows and JSON lines hold their text.
        split: What a document of a text file is: the ``"file"``, a ``"block"`` between blank
            lines, or a ``"line"``.
        drop_last: Leave out sequences shorter than ``seq_len``: the stream's last, or with separate
            boundaries each document's last.
        bos: Begin each sequence with the tokenizer's BOS, for models trained so (Llama, Gemma).
        eos: Id of EOS; None takes ``tokenizer.eos_token_id``.

    Returns:
        The batches. A sequence of one token predicts nothing and is left out.

    Raises:
        InputError: If an argument is out of range or contradicts another, or a source is missing.
    """
    found = corpora(sources, field, split)
    if weights is None:
        found = [merged(found)]
    elif len(weights) != len(found):
        raise InputError(
            f"{len(weights)} weights for {len(found)} sources: pass one weight a source (a glob or "
            "curvfast.data.files(..) is one source of many files)"
        )
    config = StreamConfig(
        seq_len=seq_len, batch_size=batch_size, seed=seed, shuffle_buffer=shuffle_buffer,
        boundaries=boundaries, weights=None if weights is None else tuple(map(float, weights)),
        exhausted=exhausted, shard=shard, drop_last=drop_last, bos=bos,
    )  # fmt: skip
    return TokenBatches(found, as_encoder(tokenizer, eos), config)


class TokenBatches:
    """Batches of tokens from text: ``input_ids`` and, where padded, ``attention_mask``.

    Each iteration starts at the beginning, but for the first after :meth:`load_state_dict`.
    """

    def __init__(self, corpora: Sequence[Corpus], encoder: Encoder, config: StreamConfig) -> None:
        """Check the tokenizer's special tokens; :func:`text_batches` makes the arguments.

        Raises:
            InputError: If it lacks the EOS or BOS that is needed.
        """
        self._corpora = corpora
        self._encoder = encoder
        self._config = config
        self._join = config.boundaries == "joined"
        self._head = [encoder.bos] if config.bos and encoder.bos is not None else []
        self._end = [encoder.eos] if self._join and encoder.eos is not None else []
        if self._join and not self._end:
            raise InputError(
                f"documents are joined by EOS, and the tokenizer ({encoder.name}) has none: pass "
                "eos=<id>, set tokenizer.eos_token, or pass boundaries='separate'"
            )
        if config.bos and not self._head:
            raise InputError(
                f"bos=True, and the tokenizer ({encoder.name}) has no bos_token_id: set "
                "tokenizer.bos_token, or pass bos=False"
            )
        # Of the files as they are now: later changes are detected when they are read again.
        self._sources = [corpus.digest() for corpus in corpora]
        self._start = self._position = Position.start(len(corpora))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Read from the beginning, or once from a loaded state; the state follows the last reader.

        Raises:
            InputError: While reading: if a source is damaged, empty, or not what it was.
        """
        start = self._position = self._start
        self._start = Position.start(len(self._corpora))
        return self._batches(start)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the stream after the last batch yielded, as JSON-able values.

        A count of documents, the remaining tokens of the last one, and a checksum: a few hundred
        bytes. Buffers are not saved; they are refilled from the sources.
        """
        return {
            "version": STATE_VERSION,
            "stream": self._identity(),
            "position": self._position.to_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration continue exactly after the batch at which ``state`` was taken.

        The sources are read again up to there, without being tokenized (JSON lines at some 200 MB a
        second), so they must be readable again from their beginning. Files may have moved; their
        names and sizes must be the same.

        Args:
            state: What :meth:`state_dict` returned, of a stream with the same arguments.

        Raises:
            InputError: If it is of another stream. If the sources hold other documents than they
                did, the next iteration raises it.
        """
        if state.get("version") != STATE_VERSION:
            raise InputError(
                f"a state of version {state.get('version')}; this curvfast reads {STATE_VERSION}"
            )
        mine, other = self._identity(), state.get("stream") or {}
        differing = [
            "sources: of other names or sizes"
            if key == "sources"
            else f"{key}: {other.get(key)!r}, here {value!r}"
            for key, value in mine.items()
            if value != other.get(key)
        ]
        if differing:
            raise InputError(
                f"the state is of another stream ({'; '.join(differing)}): pass the same arguments"
            )
        self._start = Position.from_dict(state.get("position") or {}, len(self._corpora))
        self._position = self._start

    def provenance(self) -> dict[str, Any]:
        """Return the provenance of the batches yielded so far, as JSON-able values.

        Files are named with their bytes and, up to 16 MiB, their SHA-256, else their time.
        """
        at = self._position
        weights = self._config.weights or (None,) * len(self._corpora)
        by_corpus = zip(
            self._corpora, weights, at.documents, at.document_tokens, self._sources, strict=True
        )
        return {
            **self._config.to_dict(),
            "tokenizer": self._encoder.facts(),
            "batches": at.batches,
            "sequences": at.sequences,
            "tokens": at.tokens,
            "documents": sum(at.documents),
            "corpora": [
                {"weight": w, "documents": n, "tokens": t, "digest": digest, **corpus.facts()}
                for corpus, w, n, t, digest in by_corpus
            ],
        }

    def _identity(self) -> dict[str, Any]:
        return {
            **self._config.to_dict(),
            "tokenizer": self._encoder.facts(),
            "sources": self._sources,
        }

    def _batches(self, at: Position) -> Iterator[dict[str, Tensor]]:
        texts, tally = documents(self._corpora, self._config), Tally(len(self._corpora))
        rest = self._replayed(texts, tally, at)

        def read() -> Iterator[list[int]]:
            if rest:
                yield rest
            for document, ids in self._encoder.batched(texts):
                ids += self._end
                tally.add(document, len(ids))
                yield ids

        length = self._config.seq_len - len(self._head)
        shortest = length if self._config.drop_last else 2 - len(self._head)
        pieces = pack_sequences(read(), length, shortest, join=self._join)
        while group := list(islice(pieces, self._config.batch_size)):
            sequences = [[*self._head, *piece.tokens] for piece in group]
            at = Position(
                batches=at.batches + 1,
                sequences=at.sequences + len(sequences),
                tokens=at.tokens + sum(map(len, sequences)),
                documents=tuple(tally.documents),
                document_tokens=tuple(tally.tokens),
                rest=group[-1].rest,
                checksum=tally.checksum,
            )
            self._position = at
            yield collate(sequences, self._encoder.pad)

    def _replayed(self, texts: Iterator[Document], tally: Tally, to: Position) -> list[int]:
        """Read up to a position; return the remaining tokens of the last document."""
        last = None
        for last in islice(texts, sum(to.documents)):
            tally.add(last)
        if (tuple(tally.documents), tally.checksum) != (to.documents, to.checksum):
            raise InputError(
                f"the first {sum(to.documents)} documents are not those the state was taken after: "
                "a source has changed, or an iterator was used up in part. Start anew"
            )
        tally.tokens = list(to.document_tokens)
        if last is None or not to.rest:
            return []
        ids = self._encoder.encode([last.text])[0] + self._end
        return ids[-to.rest :]
