"""Passages from files: as they were mined, as token ids, or cut from texts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from curvfast.errors import InputError
from curvfast.evals.passages import read_passages
from curvfast.hf.small import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    # No merges: every letter is a token.
    return train_tokenizer(["x"], 257)


def ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def write(path: Path, text: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


TEXTS = ["abcdefgh", "ijklm nopq", "z" * 200]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("a.txt", str),
        ("a.jsonl", lambda text: json.dumps({"text": text, "source": 3})),
        ("a.jsonl.gz", json.dumps),
        ("a.json", lambda text: json.dumps({"text": text})),
    ],
)
def test_texts_are_cut_to_what_they_begin_with(tokenizer, tmp_path, name, line) -> None:
    path = write(tmp_path / name, "\n\n".join(map(line, TEXTS)) + "\n")
    found = read_passages(path, tokenizer, prefix=3, suffix=2)
    assert [p.prefix + p.suffix for p in found] == [ids(tokenizer, text[:5]) for text in TEXTS]
    assert {len(p.suffix) for p in found} == {2}
    opened = read_passages(path, tokenizer, prefix=3, suffix=2, bos=True)
    assert [(p.prefix[0], p.prefix[1:], p.suffix) for p in opened] == [
        (tokenizer.bos_token_id, p.prefix, p.suffix) for p in found
    ]
    path = write(tmp_path / name, line(TEXTS[2]))
    (long,) = read_passages(path, tokenizer)
    assert (len(long.prefix), len(long.suffix)) == (64, 48)


def test_another_field_holds_the_text(tokenizer, tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"body": "abcd", "text": "ABCD"}))
    (found,) = read_passages(path, tokenizer, prefix=2, suffix=2, field="body")
    assert found.prefix + found.suffix == ids(tokenizer, "abcd")


def entry(tokenizer: Any, prefix: str, suffix: str) -> dict[str, Any]:
    parts = {"prefix": list(ids(tokenizer, prefix)), "suffix": list(ids(tokenizer, suffix))}
    return {**parts, "prefix_text": prefix, "suffix_text": suffix, "occurrences": 2}


def mined(*entries: Any, version: int = 1) -> str:
    report = {"kind": "curvfast-mined", "format_version": version, "passages": entries}
    return json.dumps(report, indent=2)


@pytest.mark.parametrize("kind", ["mined", "lines"])
def test_token_ids_are_taken_as_they_are(tokenizer, tmp_path, kind) -> None:
    entries = [entry(tokenizer, "abc", "de"), entry(tokenizer, "f", "ghij")]
    text = mined(*entries) if kind == "mined" else "\n".join(map(json.dumps, entries))
    found = read_passages(write(tmp_path / "a.json", text), tokenizer)
    assert [list(p.prefix) for p in found] == [e["prefix"] for e in entries]
    assert [list(p.suffix) for p in found] == [e["suffix"] for e in entries]


def test_what_cannot_be_a_passage_is_refused_with_its_place(tokenizer, tmp_path) -> None:
    good = entry(tokenizer, "abc", "de")
    refusals: list[tuple[str, str, str, dict[str, Any]]] = [
        ("a.txt", "abcde\nabc\n", r"line 2 of .* has 3 tokens, and a passage takes 3 \+ 2", {}),
        ("a.txt", "\n \n", "holds no passage", {}),
        ("a.json", mined(), "holds no passage", {}),
        ("a.json", mined(good, version=2), "version 2 of what curvfast mine writes.*reads 1", {}),
        ("a.jsonl", '{"text": null}\nabc', "row 2 of .* is not JSON", {}),
        ("a.jsonl", '{"body": "abcde"}', "row 1 of .* has no field 'text'; its fields: 'body'", {}),
        ("a.json", mined(good, good | {"suffix": []}), "'suffix' of passage 2 .*no list of", {}),
        ("a.json", mined(good | {"prefix": "abc"}), "'prefix' of passage 1 .*no list of", {}),
        ("a.json", mined(good | {"prefix": [True]}), "'prefix' of passage 1 .*no list of", {}),
        ("a.json", mined(good | {"suffix_text": "DE"}), "'suffix' .*this model's tokenizer", {}),
        ("a.jsonl", '{"prefix": [1], "suffix": [257]}', "'suffix' .*this model's tokenizer", {}),
        ("a.jsonl", '{"prefix": [-1], "suffix": [2]}', "'prefix' .*this model's tokenizer", {}),
        ("a.txt", "abcde", "prefix=0, suffix=2: pass at least 1", {"prefix": 0}),
    ]
    for name, text, match, options in refusals:
        path = write(tmp_path / name, text)
        lengths = {} if name != "a.txt" else {"prefix": 3, "suffix": 2} | options
        with pytest.raises(InputError, match=match):
            read_passages(path, tokenizer, **lengths)
    path = write(tmp_path / "a.json", mined(good))
    for options in ({"prefix": 3}, {"suffix": 2}, {"bos": True}):
        with pytest.raises(InputError, match=r"passage 1 of .* is cut already"):
            read_passages(path, tokenizer, **options)
    with pytest.raises(InputError, match="cannot be read"):
        read_passages(tmp_path / "nowhere", tokenizer)
    with pytest.raises(InputError, match="has no BOS"):
        read_passages(path, lambda text: [1, 2], bos=True)
