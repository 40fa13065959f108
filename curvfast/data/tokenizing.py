"""Adapter of tokenizers: those of transformers, by duck typing, or any function of a text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from curvfast.data.mixture import Document
from curvfast.errors import InputError

# Enough for a fast tokenizer to use every core, little memory.
_GROUP_TEXTS, _GROUP_CHARACTERS = 64, 1 << 20


@dataclass(frozen=True)
class Encoder:
    """A tokenizer in the form that the stream uses."""

    encode: Callable[[list[str]], list[list[int]]]
    """Token ids of each text, without special tokens."""
    name: str
    vocabulary: int | None
    eos: int | None
    bos: int | None
    pad: int

    def facts(self) -> dict[str, Any]:
        """Return the facts that the ids depend on."""
        return {"name": self.name, "vocabulary": self.vocabulary, "eos": self.eos}

    def batched(self, documents: Iterable[Document]) -> Iterator[tuple[Document, list[int]]]:
        """Yield the documents with their ids; a few are read ahead and encoded together."""
        for group in _grouped(documents):
            yield from zip(group, self.encode([d.text for d in group]), strict=True)


def as_encoder(tokenizer: Any, eos: int | None = None) -> Encoder:
    """Wrap a tokenizer.

    Args:
        tokenizer: One of transformers, or what is called as those are and has ``eos_token_id``; or
            a function from a text to its ids.
        eos: Id of the token that ends a document; None takes ``tokenizer.eos_token_id``.

    Returns:
        The encoder.

    Raises:
        InputError: If it cannot be called.
    """
    if not callable(tokenizer):
        raise InputError(
            f"a {type(tokenizer).__name__} is not called with text: pass a tokenizer of "
            "transformers, or a function such as lambda text: tokenizer.encode(text).ids"
        )
    special = {key: getattr(tokenizer, f"{key}_token_id", None) for key in ("eos", "bos", "pad")}
    eos = special["eos"] if eos is None else eos
    of_texts = hasattr(tokenizer, "eos_token_id")
    return Encoder(
        encode=_of_texts(tokenizer)
        if of_texts
        else lambda texts: [_ids(tokenizer(t)) for t in texts],
        name=_name(tokenizer),
        vocabulary=len(tokenizer) if hasattr(tokenizer, "__len__") else None,
        eos=eos,
        bos=special["bos"],
        # Masked positions hold any id the embedding has.
        pad=next((i for i in (special["pad"], eos) if i is not None), 0),
    )


def _of_texts(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    def encode(texts: list[str]) -> list[list[int]]:
        try:
            # transformers warns of texts longer than a model's context, which here are cut.
            found = tokenizer(texts, add_special_tokens=False, verbose=False)
        except TypeError:
            # One that is only called like its own may not know that word.
            found = tokenizer(texts, add_special_tokens=False)
        return [_ids(ids) for ids in found["input_ids"]]

    return encode


def _ids(found: Any) -> list[int]:
    if hasattr(found, "tolist"):
        found = found.tolist()
    if isinstance(found, (str, Mapping)) or not isinstance(found, Iterable):
        raise InputError(
            f"the tokenizer made a {type(found).__name__} of a text; it must return the ids as a "
            "sequence of int (and a tokenizer of transformers must have eos_token_id)"
        )
    ids = list(found)
    if ids and not isinstance(ids[0], int):
        raise InputError(
            f"the tokenizer made {type(ids[0]).__name__} of a text; its ids must be int, in one "
            "flat sequence"
        )
    return ids


def _name(tokenizer: Any) -> str:
    found = getattr(tokenizer, "name_or_path", None) or getattr(tokenizer, "__name__", None)
    # The last part only: a folder may have moved when a collection is resumed.
    return PurePath(found).name if isinstance(found, str) else type(tokenizer).__name__


def _grouped(documents: Iterable[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    characters = 0
    for document in documents:
        group.append(document)
        characters += len(document.text)
        if len(group) == _GROUP_TEXTS or characters >= _GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group
