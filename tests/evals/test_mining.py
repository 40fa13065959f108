"""Mining, position stress and nDCG: against forwards of one text at a time."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from cases import VOCABULARY, gpt2, llama
from torch import Tensor, nn

import curvfast
from curvfast import Passage
from curvfast.analysis import leading_matches, ndcg, stress, top_tokens
from curvfast.cli import main
from curvfast.errors import InputError, ShapeError
from curvfast.evals import mining as mining_module
from curvfast.evals.memorization import memorization
from curvfast.evals.mining import repeats

PREFIX, SUFFIX = 5, 9


def sharp(make: Any = llama, **changes: Any) -> nn.Module:
    """Logits of a fresh model nearly tie; a sharper head makes rounding harmless."""
    model = make(**changes)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(torch.randn_like(head.weight) * 3)
    return model.eval()


def continued(model: nn.Module, prefix: list[int], length: int) -> list[int]:
    """What greedy decoding writes, one token and one forward at a time."""
    tokens = list(prefix)
    with torch.no_grad():
        for _ in range(length):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens


def recited(model: nn.Module, prefix: list[int], suffix: list[int]) -> int:
    for k in range(len(suffix)):
        with torch.no_grad():
            logits = model(torch.tensor([[*prefix, *suffix[:k]]])).logits[0, -1]
        if int(logits.argmax()) != suffix[k]:
            return k
    return len(suffix)


def random_ids(n: int) -> list[int]:
    return torch.randint(1, VOCABULARY, (n,)).tolist()


def known_window(model: nn.Module) -> list[int]:
    """A window that is recited and is no copy."""
    while repeats(window := continued(model, random_ids(PREFIX), SUFFIX), PREFIX):
        pass
    return window


def spoilt(window: list[int], place: int) -> list[int]:
    return [*window[:place], window[place] % (VOCABULARY - 1) + 1, *window[place + 1 :]]


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_leading_matches_are_those_of_each_text_alone(make: Any, batch_size: int) -> None:
    model = sharp(make)
    prompts, goals = [], []
    for i in range(9):
        text = continued(model, random_ids(2 + i), 6)
        prompts.append(text[: 2 + i])
        goals.append(spoilt(text, 2 + i + i % 6)[2 + i :][: 6 - i % 3] if i else text[2:])
    expected = [recited(model, p, g) for p, g in zip(prompts, goals, strict=True)]
    assert expected[0] == 6
    assert len(set(expected)) > 3
    assert leading_matches(model, prompts, goals, batch_size=batch_size) == expected


def corpus(model: nn.Module) -> tuple[list[dict[str, Tensor]], list[list[int]]]:
    """Padded texts, some with known windows; and the known windows in order."""
    known = [known_window(model) for _ in range(4)]
    span = PREFIX + SUFFIX
    texts = [
        [*random_ids(span), *known[0], *random_ids(5)],
        [*spoilt(known[1], span - 1), *known[2]],
        [*known[0], *spoilt(known[1], PREFIX)],
        [*known[3], *spoilt(known[1], PREFIX + 4), *known[0]],
        random_ids(span - 1),
    ]
    width = max(map(len, texts))
    batches = []
    for number, part in enumerate((texts[:2], texts[2:])):
        tokens = torch.ones(len(part), width, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, text in enumerate(part):
            place = slice(width - len(text), None) if number else slice(len(text))
            tokens[row, place] = torch.tensor(text)
            mask[row, place] = 1
        batches.append({"input_ids": tokens, "attention_mask": mask})
    return batches, [known[0], known[2], known[3]]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_what_is_recited_is_found_once_and_nothing_else(batch_size: int) -> None:
    model = sharp()
    batches, known = corpus(model)
    found = curvfast.mine(
        model, batches, prefix=PREFIX, suffix=SUFFIX, context=3, batch_size=batch_size,
        progress=False,
    )  # fmt: skip
    windows = [[*p.prefix, *p.suffix] for p in found.passages]
    assert windows == known
    assert [len(p.suffix) for p in found.passages] == [SUFFIX] * 3
    assert [mined.occurrences for mined in found.found] == [3, 1, 1]
    assert [(m.text, m.start) for m in found.found] == [(0, 14), (1, 14), (3, 0)]
    assert found.found[0].before == tuple(batches[0]["input_ids"][0, 11:14].tolist())
    assert found.found[2].before == ()
    assert (found.windows, found.distinct) == (9, 7)
    assert "3 passages recited of 7" in str(found)
    scores = memorization(model, found.passages)
    assert scores.strict == 1


def test_overlapping_windows_are_found_at_every_stride() -> None:
    model = sharp()
    text = continued(model, random_ids(PREFIX), SUFFIX + 6)
    batch = torch.tensor([text])
    expected = [
        start
        for start in range(0, 7)
        if recited(model, text[start : start + PREFIX], text[start + PREFIX :][:SUFFIX]) == SUFFIX
    ]
    found = curvfast.mine(
        model, [batch], prefix=PREFIX, suffix=SUFFIX, stride=1, copies=True, progress=False
    )
    assert [mined.start for mined in found.found] == expected
    assert 0 in expected


def test_windows_that_miss_early_are_run_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sharp()
    calls: list[int] = []
    monkeypatch.setattr(
        mining_module, "leading_matches",
        lambda m, p, g, **k: calls.extend(map(len, g)) or leading_matches(m, p, g, **k),
    )  # fmt: skip
    known = known_window(model)
    rows = [known, *(spoilt(known, PREFIX + miss) for miss in (0, 3, 4, 8))]
    found = curvfast.mine(
        model, [torch.tensor(rows)], prefix=PREFIX, suffix=SUFFIX, batch_size=2, progress=False
    )
    assert len(found.found) == 1
    # The first stage sees all five, the second only those right in their first four tokens.
    assert sorted(calls) == [4] * 5 + [SUFFIX] * 3
    assert found.forwarded == 5 * (PREFIX + 4) + 3 * (PREFIX + SUFFIX)


def test_an_opening_is_part_of_the_prompt() -> None:
    model = sharp()
    text = continued(model, [7, *random_ids(PREFIX)], SUFFIX)
    batch = torch.tensor([text[1:]])
    found = curvfast.mine(
        model, [batch], prefix=PREFIX, suffix=SUFFIX, opening=(7,), copies=True, progress=False
    )
    assert found.passages == [Passage(tuple(text[: PREFIX + 1]), tuple(text[PREFIX + 1 :]))]


@pytest.mark.parametrize(
    ("tokens", "copied"),
    [
        ([1, 2, 3, 4, 1, 2, 3], True), ([1, 2, 3, 4, 2, 3, 4], True), ([9, 1, 2, 3, 3, 3, 3], True),
        ([9, 9, 5, 6, 5, 6, 5], True), ([1, 2, 3, 4, 5, 6, 7], False),
        ([1, 2, 3, 4, 1, 2, 4], False), ([1, 2, 3, 4, 5, 5, 5], False),
    ],
)  # fmt: skip
def test_a_copy_repeats_with_one_period(tokens: list[int], copied: bool) -> None:
    assert repeats(tokens, 4) is copied


def test_copies_are_left_out_unless_asked_for() -> None:
    model = sharp()
    with torch.no_grad():
        # Whatever comes in, token 3 goes out.
        model.get_output_embeddings().weight.zero_()
        model.get_output_embeddings().weight[3] = 0
        model.get_output_embeddings().bias = nn.Parameter(torch.eye(VOCABULARY)[3])
    batch = torch.tensor([[3] * 14, [*random_ids(PREFIX), *[3] * SUFFIX]])
    for copies, count in ((False, 1), (True, 2)):
        found = curvfast.mine(
            model, [batch], prefix=PREFIX, suffix=SUFFIX, copies=copies, progress=False
        )
        assert (len(found.found), found.copies) == (count, 2 - count)


def test_left_extension_and_right_shift_are_forwards_of_the_moved_prompt() -> None:
    model = sharp()
    passages, contexts = [], []
    for i in range(4):
        text = continued(model, random_ids(4 + PREFIX + i), SUFFIX)
        contexts.append(text[:4])
        passages.append(Passage(tuple(text[4 : 4 + PREFIX + i]), tuple(text[4 + PREFIX + i :])))
    found = stress(model, passages, left=(1, 4), right=(2, 5), contexts=contexts, batch_size=3)
    assert found.variants == ("as is", "left 1", "left 4", "right 2", "right 5")
    for row, (p, c) in enumerate(zip(passages, contexts, strict=True)):
        whole = [*p.prefix, *p.suffix]
        moved = [(whole[k : len(p.prefix) + k], list(p.suffix[k:])) for k in (0, 2, 5)]
        expected = [
            recited(model, *moved[0]),
            recited(model, [*c[-1:], *p.prefix], list(p.suffix)),
            recited(model, [*c, *p.prefix], list(p.suffix)),
            recited(model, *moved[1]),
            recited(model, *moved[2]),
        ]
        assert found.lengths[row].tolist() == expected
        assert expected[2] == SUFFIX
    assert found.possible[0].tolist() == [SUFFIX, SUFFIX, SUFFIX, SUFFIX - 2, SUFFIX - 5]
    assert found.longest.tolist() == [SUFFIX] * 4
    assert not found.offsets_are_void
    assert "left 4" in str(found)
    assert found.to_dict()["longest"] == [SUFFIX] * 4


def test_an_opening_stays_in_front_of_moved_prompts() -> None:
    model = sharp()
    text = continued(model, [7, *random_ids(PREFIX)], SUFFIX)
    passage = Passage(tuple(text[: PREFIX + 1]), tuple(text[PREFIX + 1 :]))
    context = random_ids(3)
    found = stress(model, [passage], left=(3,), right=(2,), contexts=[context], opening=1)
    assert found.lengths[0].tolist() == [
        SUFFIX,
        recited(model, [7, *context, *text[1 : PREFIX + 1]], list(passage.suffix)),
        recited(model, [7, *text[3 : PREFIX + 3]], list(passage.suffix[2:])),
    ]


def test_a_constant_shift_is_void_with_rotary_positions_only() -> None:
    for make, void in ((llama, True), (gpt2, False)):
        model = sharp(make)
        if make is gpt2:
            model.transformer.wpe.weight.data.normal_()
        passages = [
            Passage(tuple(t[:PREFIX]), tuple(t[PREFIX:]))
            for t in (continued(model, random_ids(PREFIX), 6) for _ in range(3))
        ]
        found = stress(model, passages, right=(), offsets=(9, 30))
        assert found.offsets_are_void is void
        assert ("tests nothing" in str(found)) is void
        if void:
            assert (found.lengths == 6).all()
        else:
            assert (found.lengths[:, 1:] < 6).any()
        with pytest.raises(InputError, match="past the model's 64 positions; pass at most 53"):
            stress(model, passages, right=(), offsets=(54,))


def test_the_reversed_ranking_scores_as_relevance_by_the_baselines_rank_says() -> None:
    order = torch.arange(10)[None]
    assert ndcg(order, order).item() == pytest.approx(1)
    assert ndcg(order, order.flip(1)).item() == pytest.approx(0.668, abs=5e-4)
    assert ndcg(order, order + 10).item() == 0
    baseline = torch.stack([torch.randperm(20)[:4] for _ in range(30)])
    found = torch.stack([torch.randperm(20)[:4] for _ in range(30)])
    for b, f, score in zip(baseline.tolist(), found.tolist(), ndcg(baseline, found), strict=True):
        gain = sum((4 - b.index(t)) / math.log2(r + 2) for r, t in enumerate(f) if t in b)
        ideal = sum((4 - r) / math.log2(r + 2) for r in range(4))
        assert score.item() == pytest.approx(gain / ideal)
    with pytest.raises(ShapeError, match="one shape"):
        ndcg(order, order[:, :4])


def test_top_tokens_are_those_of_predicting_positions_alone() -> None:
    model = sharp()
    texts = [random_ids(n) for n in (4, 7)]
    tokens = torch.full((2, 7), 9)
    mask = torch.zeros_like(tokens)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
    found = top_tokens(model, [{"input_ids": tokens, "attention_mask": mask}], 3)
    with torch.no_grad():
        expected = [model(torch.tensor([t])).logits[0, :-1].topk(3).indices for t in texts]
    assert torch.equal(found, torch.cat(expected))
    for k in (0, VOCABULARY + 1):
        with pytest.raises(InputError, match="k="):
            top_tokens(model, [tokens], k)
    with pytest.raises(InputError, match="no position"):
        top_tokens(model, [])


def test_nothing_of_the_model_is_changed() -> None:
    model = sharp().train()
    model.model.layers[1].eval()
    model.model.norm.weight.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    batch = torch.ones(3, PREFIX + SUFFIX).long()
    curvfast.mine(model, [batch], prefix=PREFIX, suffix=SUFFIX, copies=True, progress=False)
    stress(model, [Passage((1, 2), (3, 4))], right=(1,), offsets=(2,))
    top_tokens(model, [batch])
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.is_grad_enabled()


def test_bad_input_is_refused_with_a_reason() -> None:
    model = sharp()
    batch = torch.ones(2, 14).long()
    for changes in (
        {"prefix": 0},
        {"suffix": 0},
        {"stride": 0},
        {"batch_size": 0},
        {"context": -1},
    ):
        with pytest.raises(InputError, match="at least 1"):
            curvfast.mine(model, [batch], **changes)
    with pytest.raises(InputError, match="112 tokens"):
        curvfast.mine(model, [batch])
    for wrong in ({"pixel_values": batch}, batch[0], batch.tolist()):
        with pytest.raises(InputError, match="input_ids"):
            curvfast.mine(model, [wrong])
    passage = Passage((1, 2), (3, 4))
    with pytest.raises(InputError, match="got none"):
        stress(model, [])
    with pytest.raises(InputError, match="contexts="):
        stress(model, [passage], left=(2,), right=(), contexts=[[1]])
    with pytest.raises(InputError, match="leaves nothing"):
        stress(model, [passage], right=(2,))
    with pytest.raises(InputError, match="from 1 on"):
        stress(model, [passage], right=(0,))
    with pytest.raises(InputError, match="empty"):
        leading_matches(model, [[]], [[1]])


def test_the_command_line_mines_a_corpus(tmp_path: Any, capsys: Any) -> None:
    from curvfast.hf.small import new_llama, save, train_tokenizer

    # No merges: every letter is a token. Only letters are ever likely.
    tokenizer = train_tokenizer(["x"], 257)
    letters = tokenizer("abcdefghijklmnopqrstuvwxyz", add_special_tokens=False)["input_ids"]
    model = new_llama(vocabulary=257, hidden=16, mlp=24, layers=1, heads=2, length=64, seed=0)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight.mul_(torch.zeros(257, 1).index_fill_(0, torch.tensor(letters), 9))
    folder = tmp_path / "model"
    save(model, tokenizer, folder)
    model.eval()
    lines, known = [], []
    for number in range(12):
        prefix = [letters[i] for i in torch.randint(26, (4,))]
        window = continued(model, prefix, 2)
        if number % 2:
            window[-1] = letters[(letters.index(window[-1]) + 1) % 26]
        else:
            known.append(window)
        lines.append(tokenizer.decode(window))
    text = tmp_path / "a.txt"
    text.write_text("\n".join([*lines, lines[0]]), encoding="utf-8")
    out = tmp_path / "found.json"
    sizes = ["--split", "line", "--prefix", "4", "--suffix", "2", "--copies"]
    assert main(["-q", "mine", str(folder), str(text), *sizes, "--out", str(out)]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    assert [[*p["prefix"], *p["suffix"]] for p in found["passages"]] == known
    assert [p["prefix_text"] + p["suffix_text"] for p in found["passages"]] == lines[::2]
    assert [p["occurrences"] for p in found["passages"]] == [2, 1, 1, 1, 1, 1]
    assert (found["windows"], found["distinct"], found["format_version"]) == (13, 12, 1)
    printed = capsys.readouterr()
    assert printed.out.startswith("6 passages recited of 12 distinct windows")
    assert printed.out.endswith("and 1 more\n")
    assert not printed.err
    assert main(["mine", str(tmp_path / "nowhere"), "x.txt"]) == 1
    assert "nowhere" in capsys.readouterr().err
    for wrong in (["--dtype", "int8"], ["--device", "no_device"], ["--prefix", "0"]):
        assert main(["mine", str(folder), str(text), *wrong]) == 1
        assert capsys.readouterr().err.startswith("curvfast: ")
