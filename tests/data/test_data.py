"""Text becomes batches with nothing lost, nothing twice, nothing mixed, and the same every time."""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import logging
import lzma
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import curvfast
from curvfast.data import TokenBatches, files, rows, text_batches
from curvfast.data.mixture import mixed, own_generator, shuffled
from curvfast.data.packing import collate, pack_sequences
from curvfast.errors import InputError
from curvfast.hf.small import new_llama, train_tokenizer

EOS = 256


def spell(text: str) -> list[int]:
    """A tokenizer that is easily undone: bytes."""
    return list(text.encode())


def batches_of(sources: Any, tokenizer: Any = spell, **options: Any) -> TokenBatches:
    return text_batches(sources, tokenizer, **{"eos": EOS, "seq_len": 8, **options})


def sequences(batches: TokenBatches) -> list[list[int]]:
    """The real tokens of every sequence, padding taken off by the mask."""
    found = []
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        found += [row[keep].tolist() for row, keep in zip(batch["input_ids"], mask, strict=True)]
    return found


def documents(batches: TokenBatches) -> list[str]:
    """The documents of a joined stream. The last lacks its end if that was a token alone."""
    tokens = list(itertools.chain(*sequences(batches)))
    ends = [i for i, token in enumerate(tokens) if token == EOS]
    starts = [0, *(end + 1 for end in ends)]
    parts = [bytes(tokens[s:e]).decode() for s, e in zip(starts, [*ends, None], strict=True)]
    return [part for part in parts if part]


def numbered(count: int, name: str = "d") -> list[str]:
    # Four characters and EOS: no sequence of 8, and no stream of them, ends on a lone token.
    return [f"{name}{i:03d}" for i in range(count)]


TEXTS = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=30),
    min_size=1, max_size=12,
).filter(lambda texts: any(text.strip() for text in texts))  # fmt: skip


class TestPacking:
    @given(TEXTS, st.integers(2, 17), st.integers(1, 4))
    def test_joined_sequences_are_the_documents_in_order(self, texts, seq_len, size) -> None:
        options = {"seq_len": seq_len, "batch_size": size, "shuffle_buffer": 0}
        expected = []
        for text in texts:
            expected += [*spell(text), EOS] if text.strip() else []
        if len(expected) % seq_len == 1:
            expected.pop()
        found = sequences(batches_of(rows(texts), **options))
        assert list(itertools.chain(*found)) == expected
        assert all(len(sequence) == seq_len for sequence in found[:-1])
        whole = sequences(batches_of(rows(texts), drop_last=True, **options))
        assert whole == [sequence for sequence in found if len(sequence) == seq_len]

    @given(TEXTS, st.integers(2, 17), st.integers(1, 4), st.booleans())
    def test_separate_sequences_are_pieces_of_one_document(
        self, texts, seq_len, size, drop_last
    ) -> None:
        batches = batches_of(
            rows(texts), seq_len=seq_len, batch_size=size, shuffle_buffer=0, eos=None,
            boundaries="separate", drop_last=drop_last,
        )  # fmt: skip
        expected = []
        for tokens in (spell(text) for text in texts if text.strip()):
            pieces = [tokens[i : i + seq_len] for i in range(0, len(tokens), seq_len)]
            shortest = seq_len if drop_last else 2
            expected += [piece for piece in pieces if len(piece) >= shortest]
        assert sequences(batches) == expected

    @given(st.lists(st.lists(st.integers(0, 9), max_size=20), max_size=8), st.integers(1, 7))
    def test_what_follows_a_sequence_is_the_last_documents_rest(self, texts, length) -> None:
        for join in (True, False):
            read: list[list[int]] = []
            reading = (read.append(text) or text for text in texts)
            pieces = pack_sequences(reading, length, 1, join=join)
            for i, piece in enumerate(pieces):
                rest = read[-1][len(read[-1]) - piece.rest :]
                unread = texts[len(read) :]
                after = [p.tokens for p in pack_sequences([rest, *unread], length, 1, join=join)]
                every = [p.tokens for p in pack_sequences(texts, length, 1, join=join)]
                assert after == every[i + 1 :]

    def test_padding_is_on_the_right_and_masked(self) -> None:
        batch = collate([[5, 6, 7], [8]], pad=9)
        assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
        assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64

    def test_full_batches_have_no_mask(self) -> None:
        assert set(collate([[1, 2], [3, 4]], pad=0)) == {"input_ids"}

    def test_batch_size_does_not_change_the_sequences(self) -> None:
        one, seven = (
            sequences(batches_of(rows(numbered(90)), batch_size=n, shuffle_buffer=10))
            for n in (1, 7)
        )
        assert one == seven

    def test_every_sequence_begins_with_bos(self) -> None:
        class Tokenizer:
            eos_token_id, bos_token_id, pad_token_id = 256, 257, None

            def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, Any]:
                assert not add_special_tokens
                return {"input_ids": [spell(text) for text in texts]}

        options = {"tokenizer": Tokenizer(), "eos": None, "shuffle_buffer": 0}
        with_bos = sequences(batches_of(rows(numbered(9)), bos=True, **options))
        without = sequences(batches_of(rows(numbered(9)), seq_len=7, **options, bos=False))
        assert with_bos == [[257, *sequence] for sequence in without]


class TestShuffling:
    @given(st.lists(st.text(max_size=3)), st.integers(0, 9), st.integers())
    def test_it_is_a_permutation_from_a_bounded_buffer(self, texts, capacity, seed) -> None:
        read = 0

        def reading() -> Iterator[str]:
            nonlocal read
            for text in texts:
                read += 1
                yield text

        given_ = []
        for text in shuffled(reading(), capacity, random.Random(seed)):
            given_.append(text)
            assert read - len(given_) < max(1, capacity)
        assert Counter(given_) == Counter(texts)
        if capacity <= 1:
            assert given_ == texts

    def test_long_texts_fill_the_buffer_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("curvfast.data.mixture._MOST_CHARACTERS", 100)
        read = []
        stream = (read.append(i) or "x" * 30 for i in range(50))
        for given_, text in enumerate(shuffled(stream, 1000, random.Random(0)), 1):
            assert text == "x" * 30
            assert len(read) - given_ <= 3
        assert given_ == 50

    def test_a_buffer_as_large_as_the_corpus_gives_every_order_alike(self) -> None:
        orders = Counter(
            "".join(shuffled("abc", 3, own_generator(seed, "test"))) for seed in range(6000)
        )
        assert len(orders) == 6
        assert all(abs(count - 1000) < 4 * 1000**0.5 for count in orders.values())

    def test_the_seed_decides_and_the_global_generators_are_untouched(self) -> None:
        def order(seed: int) -> list[str]:
            two = [rows(numbered(50)), rows(numbered(50, "e"))]
            return documents(batches_of(two, seed=seed, weights=[1, 2]))

        states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1]
        first = order(0)
        random.seed(1)
        assert order(0) == first != order(1)
        random.setstate(states[0])
        assert documents(batches_of(rows(numbered(9)))) != numbered(9)
        assert random.getstate() == states[0]
        assert torch.equal(torch.get_rng_state(), states[1])
        assert (np.random.get_state()[1] == states[2]).all()

    def test_files_are_not_read_in_alphabetical_order(self, tmp_path: Path) -> None:
        for i in range(40):
            write_jsonl(tmp_path / f"{i:02d}.jsonl", [f"f{i:02d}{j:02d}" for j in range(20)])

        def order(**options: Any) -> list[str]:
            return documents(batches_of(str(tmp_path / "*.jsonl"), **options))

        plain = order(shuffle_buffer=0)
        assert plain == sorted(plain)
        # A buffer of one keeps the order it reads in: what is left is the order of the files.
        first = [text[1:3] for text in order(shuffle_buffer=1)[:160]]
        assert len(set(first)) > 10
        assert min(first) < "20" <= max(first)
        assert sorted(order(shuffle_buffer=1)) == plain

    def test_files_are_read_in_proportion_to_their_bytes(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "small.jsonl", numbered(100, "s"))
        write_jsonl(tmp_path / "large.jsonl", numbered(900, "l"))
        read = documents(batches_of(str(tmp_path / "*.jsonl"), shuffle_buffer=1))
        early = sum(text.startswith("s") for text in read[:500])
        assert abs(early - 50) < 4 * (500 * 0.1 * 0.9) ** 0.5


class TestShards:
    @given(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), st.integers(1, 5))
    def test_they_are_disjoint_and_together_everything(self, sizes, count) -> None:
        expected = [f"{i}.{j:02d}" for i, size in enumerate(sizes) for j in range(size)]
        sources = [
            rows([text for text in expected if text.startswith(f"{i}.")]) for i in range(len(sizes))
        ]
        # Seeds differ: shards may not depend on the order of reading.
        shards = [
            documents(batches_of(sources, shard=(i, count), seed=i, seq_len=5))
            for i in range(count)
        ]
        assert sorted(itertools.chain(*shards)) == expected
        assert max(map(len, shards)) - min(map(len, shards)) <= len(sizes)

    def test_files_of_one_document_are_dealt_out_evenly(self, tmp_path: Path) -> None:
        for name in numbered(12):
            (tmp_path / f"{name}.txt").write_text(name)
        shards = [
            documents(batches_of(str(tmp_path / "*.txt"), shard=(i, 4), seq_len=5))
            for i in range(4)
        ]
        assert [len(shard) for shard in shards] == [3] * 4
        assert sorted(itertools.chain(*shards)) == numbered(12)

    def test_records_of_other_shards_are_not_decoded(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "mine"}\nnot json\n{"text": "mine too"}\n')
        found = documents(batches_of(path, shard=(1, 2), shuffle_buffer=0))
        assert found == ["mine", "mine too"]


class TestMixture:
    def test_shares_of_documents_are_the_weights(self) -> None:
        weights = [6, 3, 1]
        streams = [itertools.repeat(name) for name in "abc"]
        drawn = mixed(streams, weights, "stop", random.Random(0))
        counts = Counter(document.corpus for document in itertools.islice(drawn, 10_000))
        for corpus, weight in enumerate(weights):
            share = weight / 10
            deviation = (10_000 * share * (1 - share)) ** 0.5
            assert abs(counts[corpus] - 10_000 * share) < 4 * deviation

    @pytest.mark.parametrize("exhausted", ["stop", "continue"])
    def test_the_end_of_a_corpus(self, exhausted: str) -> None:
        sources = [rows(numbered(10, "a")), rows(numbered(300, "b"))]
        batches = batches_of(sources, weights=[1, 1], exhausted=exhausted)
        found = documents(batches)
        counts = Counter(text[0] for text in found)
        assert counts["a"] == 10
        assert len(set(found)) == len(found)
        assert counts["b"] < 60 if exhausted == "stop" else counts["b"] == 300
        facts = batches.provenance()["corpora"]
        assert [c["documents"] for c in facts] == [counts["a"], counts["b"]]
        assert [c["tokens"] for c in facts] == [5 * counts["a"], 5 * counts["b"]]

    def test_unshuffled_corpora_keep_their_own_order(self) -> None:
        sources = [rows(numbered(30, name)) for name in "abc"]
        found = documents(
            batches_of(sources, weights=[1, 2, 3], shuffle_buffer=0, exhausted="continue")
        )
        for name in "abc":
            assert [text for text in found if text[0] == name] == numbered(30, name)
        assert found != sorted(found)

    def test_without_weights_sources_are_one_corpus(self) -> None:
        sources = [rows(numbered(30, "b")), rows(numbered(30, "a"))]
        assert documents(batches_of(sources, shuffle_buffer=0)) == [
            *numbered(30, "b"), *numbered(30, "a")
        ]  # fmt: skip


STREAMS = st.fixed_dictionaries(
    {
        "seq_len": st.integers(3, 12),
        "batch_size": st.integers(1, 3),
        "shuffle_buffer": st.sampled_from([0, 3, 100]),
        "boundaries": st.sampled_from(["joined", "separate"]),
        "weights": st.sampled_from([None, [1, 1], [5, 1]]),
        "exhausted": st.sampled_from(["stop", "continue"]),
        "shard": st.sampled_from([(0, 1), (1, 2)]),
        "drop_last": st.booleans(),
        "seed": st.integers(0, 3),
    }
)


class TestResuming:
    @settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
    @given(STREAMS, st.lists(st.integers(1, 60), min_size=2, max_size=14))
    def test_after_any_batch_the_rest_is_what_it_would_have_been(self, options, sizes) -> None:
        texts = [(f"{i}." * 60)[:size] for i, size in enumerate(sizes)]

        def new() -> TokenBatches:
            return batches_of([rows(texts[::2]), rows(texts[1::2])], **options)

        whole = new()
        every, states, facts = [], [whole.state_dict()], [whole.provenance()]
        for batch in whole:
            every.append(batch)
            states.append(whole.state_dict())
            facts.append(whole.provenance())
        for k, state in enumerate(states):
            resumed = new()
            resumed.load_state_dict(json.loads(json.dumps(state)))
            assert resumed.state_dict() == state
            assert resumed.provenance() == facts[k]
            rest = list(resumed)
            assert len(rest) == len(every) - k
            for mine, expected in zip(rest, every[k:], strict=True):
                assert mine.keys() == expected.keys()
                assert all(torch.equal(mine[key], expected[key]) for key in mine)
            assert resumed.state_dict() == states[-1]
            assert resumed.provenance() == facts[-1]

    def test_replayed_documents_are_not_tokenized(self) -> None:
        seen: list[str] = []

        def spell_and_note(text: str) -> list[int]:
            seen.append(text)
            return spell(text)

        first, second = (
            batches_of(rows(numbered(100)), spell_and_note, shuffle_buffer=0) for _ in range(2)
        )
        next(itertools.islice(first, 4, None))
        seen.clear()
        second.load_state_dict(first.state_dict())
        list(second)
        # Five batches of eight sequences of eight are 64 documents of five tokens.
        assert seen == numbered(100)[64:]

    def test_one_resumption_only_then_from_the_beginning(self) -> None:
        batches = batches_of(rows(numbered(20)), batch_size=1)
        every = sequences(batches)
        next(iter(batches))
        batches.load_state_dict(batches.state_dict())
        assert sequences(batches) == every[1:]
        assert sequences(batches) == every

    def test_the_state_does_not_grow(self) -> None:
        batches = batches_of(rows(["x" * 50_000, *numbered(500)]), batch_size=1)
        sizes = {len(json.dumps(batches.state_dict())) for _ in batches}
        assert max(sizes) < 1000

    def test_a_state_of_another_stream_is_refused_by_what_differs(self) -> None:
        state = batches_of(rows(numbered(20)), seed=3).state_dict()
        with pytest.raises(InputError, match="seed: 3, here 4"):
            batches_of(rows(numbered(20)), seed=4).load_state_dict(state)
        with pytest.raises(InputError, match="sources: of other names or sizes"):
            batches_of(rows(numbered(21)), seed=3).load_state_dict(state)
        with pytest.raises(InputError, match="version 99"):
            batches_of(rows(numbered(20))).load_state_dict({**state, "version": 99})
        with pytest.raises(InputError, match="position is damaged: KeyError"):
            batches_of(rows(numbered(20)), seed=3).load_state_dict({**state, "position": {}})

    def test_files_may_move_but_not_change(self, tmp_path: Path) -> None:
        here, there = tmp_path / "here", tmp_path / "there"
        for folder in (here, there):
            folder.mkdir()
            write_jsonl(folder / "a.jsonl", numbered(50))
        batches = batches_of(here / "a.jsonl", batch_size=1)
        every = sequences(batches)
        next(itertools.islice(batches, 3, None))
        state = batches.state_dict()
        moved = batches_of(there / "a.jsonl", batch_size=1)
        moved.load_state_dict(state)
        assert sequences(moved) == every[4:]
        # Of the same size: only reading it again can tell.
        write_jsonl(there / "a.jsonl", numbered(50, "e"))
        moved.load_state_dict(state)
        with pytest.raises(InputError, match="a source has changed"):
            list(moved)


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text, "id": 1}) + "\n" for text in texts))
    return path


class Dataset:
    """What a datasets.Dataset looks like from here."""

    _fingerprint = "d7a8"

    def __init__(self, texts: list[str], field: str = "text") -> None:
        self.rows = [{"id": i, field: text} for i, text in enumerate(texts)]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


class TestSources:
    @pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz"])
    @pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
    def test_files_and_their_compressions_hold_the_same(
        self, tmp_path: Path, name: str, suffix: str
    ) -> None:
        texts = ["one\u2028line", "zwei größere", "三"]
        raw = "\ufeff" + ("\n" if name == "a.txt" else "\n\n").join(
            text if name == "a.txt" else json.dumps({"text": text}) for text in texts
        )
        compress = {
            "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress
        }[suffix]  # fmt: skip
        path = tmp_path / (name + suffix)
        path.write_bytes(compress(raw.encode()))
        assert documents(batches_of(path, split="line", shuffle_buffer=0)) == texts

    @pytest.mark.parametrize(
        ("split", "expected"),
        [
            ("file", ["a\nb\n\n \nc\n"]),
            ("block", ["a\nb", "c"]),
            ("line", ["a", "b", "c"]),
        ],
    )
    def test_splits_of_a_text_file(self, tmp_path: Path, split: str, expected: list[str]) -> None:
        (tmp_path / "a.txt").write_text("a\nb\n\n \nc\n")
        assert documents(batches_of(tmp_path / "a.txt", split=split, shuffle_buffer=0)) == expected

    def test_a_file_named_twice_is_read_once(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", numbered(4))
        write_jsonl(tmp_path / "b.jsonl", numbered(4, "e"))
        for source in (files(path, tmp_path / "*.jsonl"), [path, str(tmp_path / "*.jsonl")]):
            found = documents(batches_of(source, shuffle_buffer=0))
            assert found == [*numbered(4), *numbered(4, "e")]

    def test_iterables_of_strings_and_of_rows(self) -> None:
        texts = numbered(9)
        sources = [
            rows(texts),
            rows(tuple(texts)),
            (text for text in texts),
            Dataset(texts),
            rows([{"text": text} for text in texts]),
            rows(Dataset(texts, "content"), field="content"),
        ]
        for source in sources:
            assert documents(batches_of(source, shuffle_buffer=0)) == texts
        assert documents(batches_of(Dataset(texts, "body"), field="body", seed=1)) != texts

    def test_nulls_blanks_and_lone_surrogates(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": null}\n{"text": " "}\n{"text": "a\\ud800b"}\n')
        assert documents(batches_of(path)) == ["a\ufffdb"]

    def test_an_endless_source_is_read_as_far_as_the_buffer(self) -> None:
        read = itertools.count()
        endless = (f"d{i:07d}" for i in read)
        batches = batches_of(endless, shuffle_buffer=500, batch_size=2)
        next(itertools.islice(batches, 99, None))
        taken = 100 * 2 * 8 // 9
        assert 500 + taken <= next(read) <= 500 + taken + 64 + 1

    def test_real_datasets(self) -> None:
        datasets = pytest.importorskip("datasets")
        texts = numbered(60)
        dataset = datasets.Dataset.from_dict({"body": texts, "id": list(range(60))})
        for source in (dataset, dataset.to_iterable_dataset(num_shards=3)):
            batches = batches_of(source, field="body", shuffle_buffer=0, batch_size=3)
            assert documents(batches) == texts
            next(itertools.islice(batches, 4, None))
            again = batches_of(source, field="body", shuffle_buffer=0, batch_size=3)
            again.load_state_dict(batches.state_dict())
            assert sequences(again) == sequences(batches)[15:]
        assert batches_of(dataset).provenance()["corpora"][0]["parts"][0]["fingerprint"]
        both = datasets.DatasetDict({"train": dataset})
        with pytest.raises(InputError, match=r"dataset\['train'\]|one split"):
            batches_of(both)


class TestProvenance:
    def test_it_names_sources_tokenizer_and_counts(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", numbered(50))
        batches = batches_of([path, Dataset(numbered(50))], weights=[3, 1], batch_size=5)
        assert batches.provenance()["tokens"] == 0
        next(iter(batches))
        facts = json.loads(json.dumps(batches.provenance()))
        assert facts["tokens"] == 40
        assert facts["sequences"] == 5
        assert facts["documents"] == 8 == sum(c["documents"] for c in facts["corpora"])
        assert facts["tokenizer"] == {"name": "spell", "vocabulary": None, "eos": 256}
        assert (facts["seq_len"], facts["seed"]) == (8, 0)
        (part,), (other,) = (corpus["parts"] for corpus in facts["corpora"])
        assert part["bytes"] == path.stat().st_size
        assert len(part["sha256"]) == 64
        assert (other["length"], other["fingerprint"]) == (50, "d7a8")

    def test_large_files_are_known_by_their_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("curvfast.data.reading._HASHED_BYTES", 10)
        path = write_jsonl(tmp_path / "a.jsonl", numbered(50))
        ((part,),) = (c["parts"] for c in batches_of(path).provenance()["corpora"])
        assert set(part) == {"path", "bytes", "modified", "field"}

    def test_a_file_gone_since_stops_nothing(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", numbered(50))
        batches = batches_of(path)
        list(batches)
        state = batches.state_dict()
        path.unlink()
        ((part,),) = (c["parts"] for c in batches.provenance()["corpora"])
        assert "a.jsonl" in part["unreadable"]
        assert batches.state_dict() == state


class TestTransformers:
    texts = tuple(f"the {i} quick brown foxes jump over {i * i} lazy dogs" for i in range(80))

    def test_its_tokenizers_give_their_ids_and_no_warning(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
        tokenizer = train_tokenizer(self.texts, 300)
        tokenizer.model_max_length = 4
        batches = text_batches(rows(self.texts), tokenizer, seq_len=16, shuffle_buffer=0)
        with caplog.at_level(logging.WARNING, "transformers"):
            found = list(itertools.chain(*sequences(batches)))
        assert not caplog.records
        expected = []
        for text in self.texts:
            expected += [*tokenizer(text, add_special_tokens=False)["input_ids"], 0]
        assert found == expected
        assert batches.provenance()["tokenizer"]["vocabulary"] == len(tokenizer)

    @pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")
    @pytest.mark.parametrize("boundaries", ["joined", "separate"])
    def test_factors_keep_what_they_were_measured_on(self, tmp_path: Path, boundaries: str) -> None:
        tokenizer = train_tokenizer(self.texts, 300)
        model = new_llama(
            vocabulary=300, hidden=16, mlp=24, layers=1, heads=2, length=32, seed=0
        )  # fmt: skip
        path = write_jsonl(tmp_path / "a.jsonl", list(self.texts))

        def batches() -> TokenBatches:
            return text_batches(path, tokenizer, seq_len=16, boundaries=boundaries, batch_size=32)

        mine = batches()
        factors = curvfast.collect_from(model, mine, labels="gold", progress=False)
        plain = curvfast.collect_from(model, list(batches()), labels="gold", progress=False)
        for name in factors:
            assert torch.equal(factors[name].g_sum, plain[name].g_sum)
        assert "data" not in plain.provenance
        data = factors.provenance["data"]
        # Every sequence's last token predicts nothing.
        assert factors.rows == data["tokens"] - data["sequences"]
        factors.save_pretrained(tmp_path / "factors")
        again = curvfast.Factors.from_pretrained(tmp_path / "factors").provenance["data"]
        assert again == mine.provenance()
        assert again["corpora"][0]["parts"][0]["path"] == path.as_posix()

    @pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")
    def test_an_interrupted_collection_goes_on_to_the_same_sums(self) -> None:
        tokenizer = train_tokenizer(self.texts, 300)
        model = new_llama(
            vocabulary=300, hidden=16, mlp=24, layers=1, heads=2, length=32, seed=0
        )  # fmt: skip

        def measured(batches: TokenBatches, tokens: int | None = None) -> curvfast.Factors:
            return curvfast.collect_from(
                model, batches, labels="gold", tokens=tokens, progress=False
            )

        first, second, whole = (
            text_batches(rows(self.texts), tokenizer, seq_len=16, batch_size=16) for _ in range(3)
        )
        parts = measured(first, tokens=300)
        second.load_state_dict(first.state_dict())
        both, expected = parts + measured(second), measured(whole)
        assert both.rows == expected.rows > parts.rows
        for name in expected:
            torch.testing.assert_close(both[name].G, expected[name].G, rtol=1e-5, atol=1e-6)


class TestErrorsTeach:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"seq_len": 1}, "seq_len=1: the last token of a sequence predicts nothing"),
            ({"batch_size": 0}, "batch_size=0"),
            ({"shuffle_buffer": -1}, "0 to keep the sources' order"),
            ({"boundaries": "packed"}, "'joined' .* 'separate'"),
            ({"exhausted": "cycle"}, "'stop' ends the stream"),
            ({"weights": [1, 2]}, "2 weights for 1 sources"),
            ({"weights": [0]}, "positive"),
            ({"weights": [float("nan")]}, "positive"),
            ({"shard": (2, 2)}, "rank, world_size"),
            ({"eos": None}, r"spell.*eos=<id>.*boundaries='separate'"),
            ({"bos": True}, "no bos_token_id"),
            ({"tokenizer": 3}, "pass a tokenizer of transformers, or a function"),
        ],
    )
    def test_about_arguments(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            batches_of(rows(numbered(3)), **options)

    @pytest.mark.parametrize(
        ("sources", "message"),
        [
            ("Four score and seven", r"no file 'Four score .*curvfast.data.rows\(texts\)"),
            (["nothing/*.jsonl"], "no file 'nothing"),
            ([], "sources is empty"),
            ([["a", "b"]], "may mean paths or rows"),
            ({"train": ["a"]}, r"dataset\['train'\]"),
            ([{"text": "a"}], "may mean paths or rows"),
            (7, "pass an iterable"),
            ("table.parquet", "datasets.load_dataset"),
            (".", "is a folder; pass a glob"),
        ],
    )
    def test_about_sources(
        self, sources: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("table.parquet").write_bytes(b"PAR1")
        with pytest.raises(InputError, match=message):
            batches_of(sources)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b'{"text": "a"}\n{"body": "b", "id": 1}\n',
             r"row 2 of '.*a.jsonl' has no field 'text'; its fields: 'body', 'id'"),
            (b'{"text": 3}', "row 1 of .* is a int, not text"),
            (b'[\n{"text": "a"}\n]', "row 1 of .* is not JSON.*one object a line"),
            (b"[1]", "row 1 of .* is a list; a row is a string or a dict"),
            (b'{"text": "\xff"}', "not UTF-8"),
            (b"\n\n", "'a.jsonl' holds no document"),
        ],
    )  # fmt: skip
    def test_about_rows(self, content: bytes, message: str, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_bytes(content)
        with pytest.raises(InputError, match=message):
            list(batches_of(tmp_path / "a.jsonl"))

    def test_about_files_that_end_too_soon(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl.gz"
        whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(999)))
        for damaged in (whole[:-100], b"no gzip at all"):
            path.write_bytes(damaged)
            with pytest.raises(InputError, match="cannot be read to its end"):
                list(batches_of(path))

    def test_about_documents_too_long_to_hold(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("curvfast.data.parts._LONGEST", 20)
        (tmp_path / "a.txt").write_text("a line of text\n\n" * 3)
        assert len(documents(batches_of(tmp_path / "a.txt", split="block"))) == 3
        with pytest.raises(InputError, match=r"held in memory whole.*split='block'"):
            list(batches_of(tmp_path / "a.txt"))

    def test_about_iterators_that_were_used_up(self) -> None:
        batches = batches_of(text for text in numbered(5))
        assert len(documents(batches)) == 5
        with pytest.raises(InputError, match=r"used up .*can be read again"):
            list(batches)

    @pytest.mark.parametrize(
        "tokenizer", [str.upper, lambda t: {"input_ids": [1]}, lambda t: [[1]], len]
    )
    def test_about_tokenizers_that_return_no_ids(self, tokenizer: Any) -> None:
        with pytest.raises(InputError, match="ids"):
            list(batches_of(rows(numbered(3)), tokenizer))

    def test_about_decompressors_this_python_lacks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(__import__("sys").modules, "compression.zstd", None)
        (tmp_path / "a.jsonl.zst").write_bytes(b"")
        with pytest.raises(InputError, match=r"\.zst needs 3.14"):
            batches_of(tmp_path / "a.jsonl.zst")
