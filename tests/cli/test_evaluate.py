"""curvfast evaluate: the figures of a model and of the patched model; the checkpoint stays."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import harness_stand_in as stand_in
import pytest
import torch

import curvfast
from curvfast.cli import main
from curvfast.data import text_batches
from curvfast.evals import memorization, perplexity
from curvfast.evals.comparison import Change, Score, changes, table_of
from curvfast.hf.small import load, new_llama, save, train_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")
SIZES = ["--prefix", "4", "--suffix", "3"]


def basis_of(model: Any, letters: list[int]) -> curvfast.Eigenbasis:
    """Return the eigenbasis of the MLPs on more rows than they are wide."""
    rows = torch.tensor(letters)[torch.randint(26, (8, 20))]
    return curvfast.collect_from(model, [rows], layers="mlp", progress=False).eigh()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, two patches, texts, and what the model recites of them."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    # No merges: every letter is a token. Only letters are ever likely.
    tokenizer = train_tokenizer(["x"], 257)
    letters = tokenizer("abcdefghijklmnopqrstuvwxyz", add_special_tokens=False)["input_ids"]
    model = new_llama(vocabulary=257, hidden=24, mlp=40, layers=2, heads=2, length=64, seed=0)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.mul_(torch.zeros(257, 1).index_fill_(0, torch.tensor(letters), 9))
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(20)
    save(model, tokenizer, folder / "model")
    basis = basis_of(model, letters)
    curvfast.make_patch(model, basis, mass=0.5, layers="*.0.mlp.*").save(folder / "first")
    curvfast.make_patch(model, basis, mass=0.3, layers="*.1.mlp.*").save(folder / "second")
    rows = []
    for _ in range(12):
        row = [letters[i] for i in torch.randint(26, (4,))]
        for _ in range(3):
            row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
        rows.append(tokenizer.decode(row))
    (folder / "known.txt").write_text("\n".join(rows), encoding="utf-8")
    mine = ["-q", "mine", str(folder / "model"), str(folder / "known.txt"), "--split", "line"]
    assert main([*mine, *SIZES, "--copies", "--out", str(folder / "mined.json")]) == 0
    words = "".join(chr(97 + i * i % 26) for i in range(500))
    (folder / "text.txt").write_text(words, encoding="utf-8")
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def cells(printed: str) -> list[list[str]]:
    return [line.split() for line in printed.splitlines()]


def test_before_and_after_are_those_of_the_model_and_of_the_patched_model(
    files, tmp_path, capsys
) -> None:
    before = digests(files / "model")
    arguments = ["--patch", str(files / "first"), "--text", str(files / "text.txt")]
    arguments += ["--patch", str(files / "second"), "--passages", str(files / "mined.json")]
    assert main(["evaluate", str(files / "model"), *arguments, "--out", str(tmp_path / "o")]) == 0
    assert digests(files / "model") == before

    model, tokenizer = load(files / "model")
    text = list(text_batches(files / "text.txt", tokenizer, seq_len=64, shuffle_buffer=0))
    mined = json.loads((files / "mined.json").read_text(encoding="utf-8"))["passages"]
    passages = [curvfast.Passage(tuple(p["prefix"]), tuple(p["suffix"])) for p in mined]
    expected = []
    for patch in (None, "first", "second"):
        if patch is not None:
            curvfast.Patch.load(files / patch).apply(model)
        found = curvfast.evaluate(model, text=text, passages=passages).to_dict()
        expected.append([found[k] for k in ("perplexity", "strict", "loose", "levenshtein")])
    result = json.loads((tmp_path / "o" / "evaluation.json").read_text(encoding="utf-8"))
    assert [row["before"] for row in result["scores"]] == expected[0]
    assert [row["after"] for row in result["scores"]] == expected[2]
    # The figures could tell either patch alone, and the model from both.
    assert expected[0][1] == 1
    assert len({tuple(figures) for figures in expected}) == 3
    ratios = [b and a / b for b, a in zip(expected[0], expected[2], strict=True)]
    assert [row["ratio"] for row in result["scores"]] == [*ratios[:3], None]

    printed = capsys.readouterr()
    assert (tmp_path / "o" / "evaluation.txt").read_text(encoding="utf-8") == printed.out
    table = cells(printed.out)
    assert table[0] == ["task", "metric", "before", "after", "after/before"]
    assert [row[:2] for row in table[1:]] == [
        ["text", "perplexity"], *(["passages", m] for m in ("strict", "loose", "levenshtein")),
    ]  # fmt: skip
    assert table[1][2:] == [f"{expected[0][0]:.4g}", f"{expected[2][0]:.4g}", f"{ratios[0]:.3f}"]
    assert "wrote evaluation.json" in printed.err
    assert (result["kind"], result["format_version"]) == ("curvfast-evaluation", 1)
    assert (result["strength"], result["dtype"]) == (1, "float32")
    assert result["passages"]["count"] == len(passages) == 12
    assert result["text"]["corpora"][0]["parts"][0]["bytes"] == 500
    assert result["tasks"] is None


@pytest.mark.parametrize("strength", ["0", "-0.5"])
def test_strength_is_that_of_the_edit(files, tmp_path, strength) -> None:
    patch, out = str(files / "first"), tmp_path / "out"
    arguments = ["--patch", patch, "--strength", strength, "--text", str(files / "text.txt")]
    assert main(["-q", "evaluate", str(files / "model"), *arguments, "--out", str(out)]) == 0
    (row,) = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))["scores"]
    model, tokenizer = load(files / "model")
    torch.manual_seed(0)
    original = {name: weight.clone() for name, weight in model.named_parameters()}
    curvfast.Patch.load(patch).apply(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(original[name] + float(strength) * (weight - original[name]))
    text = list(text_batches(files / "text.txt", tokenizer, seq_len=64, shuffle_buffer=0))
    assert row["after"] == pytest.approx(perplexity.perplexity(model, text), rel=1e-4)
    assert (row["after"] == row["before"]) == (strength == "0")


def test_without_a_patch_there_is_one_column(files, tmp_path, capsys) -> None:
    arguments = ["--passages", str(files / "known.txt"), *SIZES, "--batch", "5"]
    assert main(["-q", "evaluate", str(files / "model"), *arguments, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert cells(printed.out)[:2] == [["task", "metric", "value"], ["passages", "strict", "1"]]
    assert not printed.err
    result = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert result["scores"][0]["after"] is None
    assert result["strength"] is None
    assert (result["passages"]["prefix"], result["passages"]["suffix"]) == (4, 3)


@pytest.mark.parametrize("bos", [False, True])
def test_bos_begins_prompts_and_sequences(files, monkeypatch, bos) -> None:
    heads = []

    def seen(model: Any, given: Any, **_: Any) -> memorization.MemorizationScores:
        for one in given:
            heads.append(one.prefix[0] if hasattr(one, "prefix") else one["input_ids"][0, 0].item())
        return memorization.MemorizationScores(1, 1, 0, 1)

    monkeypatch.setattr(memorization, "memorization", seen)
    monkeypatch.setattr(perplexity, "perplexity", lambda *given: seen(*given).strict)
    arguments = ["--passages", str(files / "known.txt"), *SIZES, "--text", str(files / "text.txt")]
    command = ["-q", "evaluate", str(files / "model"), *arguments, "--seq-len", "32"]
    assert main([*command, *(["--bos"] if bos else [])]) == 0
    assert len(heads) > 12
    assert {head == 0 for head in heads} == {bos}


def test_tasks_are_asked_of_both_models(files, tmp_path, capsys, monkeypatch) -> None:
    stand_in.install(monkeypatch)
    (tmp_path / "mine.yaml").touch()
    arguments = ["--patch", str(files / "first"), "--lm-eval", "arc_easy,mine", "--limit", "7"]
    arguments += ["--lm-eval-include", str(tmp_path), "--out", str(tmp_path), "--batch", "3"]
    assert main(["-q", "evaluate", str(files / "model"), *arguments]) == 0
    model, _ = load(files / "model")
    levels = [stand_in.level(model)]
    curvfast.Patch.load(files / "first").apply(model)
    levels.append(stand_in.level(model))
    table = cells(capsys.readouterr().out)
    ratio = f"{levels[1] / levels[0]:.3f}"
    shown = [cell for level in levels for cell in (f"{level:.4g}", "±", "0.25")]
    strict = "exact_match,strict-match"
    assert table[1:] == [
        row
        for task in ("arc_easy", "mine")
        for row in ([task, "acc", *shown, ratio], [task, strict, "0", "0"])
    ]
    assert [(call["tasks"], call["limit"], call["batch"]) for call in stand_in.calls] == [
        (["arc_easy", "mine"], 7, 3)
    ] * 2
    result = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert result["tasks"] == {"names": ["arc_easy", "mine"], "limit": 7}
    assert result["versions"]["lm_eval"] == "0.4.13"
    assert [row["after_stderr"] for row in result["scores"]] == [0.25, None] * 2


def test_what_contradicts_itself_is_refused_before_the_model_is_read(
    files, tmp_path, capsys, monkeypatch
) -> None:
    stand_in.install(monkeypatch)
    text, patch = ["--text", str(files / "text.txt")], ["--patch", str(files / "first")]
    (tmp_path / "file").touch()
    for arguments, told in (
        ([], "nothing to measure: pass --text"),
        ([*text, "--strength", "2"], "--strength is of --patch"),
        ([*text, "--prefix", "2"], "--prefix is of --passages"),
        ([*text, "--limit", "2"], "--limit is of --lm-eval"),
        ([*text, "--lm-eval-include", "x"], "--lm-eval-include is of --lm-eval"),
        (["--lm-eval", "gsm8k", "--seq-len", "9"], "--seq-len is of --text"),
        ([*text, *patch, "--strength", "nan"], "--strength nan: pass a number"),
        ([*text, "--batch", "0"], "--batch and --limit"),
        (["--lm-eval", "gsm8k", "--limit", "0"], "--batch and --limit"),
        ([*text, "--out", str(tmp_path / "file")], "is a file; pass a folder"),
        ([*text, "--patch", str(tmp_path)], str(tmp_path)),
        (["--lm-eval", "gsm9k"], "it knows gsm8k"),
        (["--lm-eval", ""], "no task was named"),
    ):
        # There is no such model: whoever reads it first fails otherwise.
        assert main(["evaluate", str(tmp_path / "nowhere"), *arguments]) == 1
        assert told in capsys.readouterr().err


def test_what_does_not_fit_the_model_is_refused_before_anything_is_measured(
    files, tmp_path, capsys, monkeypatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(perplexity, "perplexity", fail)
    monkeypatch.setattr(memorization, "memorization", fail)
    text, passages = ["--text", str(files / "text.txt")], ["--passages", str(files / "known.txt")]
    patch, twice = ["--patch", str(files / "first")], ["--patch", *[str(files / "first")] * 2]
    for arguments, told in (
        ([*text, *twice], "applied already"),
        ([*text, *patch, "--dtype", "bfloat16"], "dtype=torch.float32"),
        ([*text, "--seq-len", "65"], "the model has 64 positions"),
        ([*text, "--seq-len", "0"], "seq_len=0"),
        ([*text, *passages], "has 7 tokens, and a passage takes 64 + 48"),
        (["--passages", str(files / "text.txt"), "--prefix", "62", "--suffix", "3"], "takes 65"),
        (["--passages", str(files / "mined.json"), *SIZES], "is cut already"),
    ):
        out = tmp_path / "out"
        assert main(["evaluate", str(files / "model"), *arguments, "--out", str(out)]) == 1
        assert told in capsys.readouterr().err
        assert not out.exists()


def test_a_patch_of_bfloat16_loads_the_model_so(files, tmp_path) -> None:
    model, tokenizer = load(files / "model")
    letters = tokenizer("abcdefghijklmnopqrstuvwxyz", add_special_tokens=False)["input_ids"]
    basis = basis_of(model, letters)
    curvfast.make_patch(model.bfloat16(), basis).save(tmp_path / "patch")
    arguments = ["--patch", str(tmp_path / "patch"), "--text", str(files / "text.txt")]
    assert main(["-q", "evaluate", str(files / "model"), *arguments, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert result["dtype"] == "bfloat16"


def test_figures_without_a_ratio_and_without_json_are_left_out() -> None:
    before = [Score("a", "m", 0.0), Score("b", "m", 2.0, 0.5), Score("a", "n", 1.0)]
    after = [Score("b", "m", float("inf")), Score("a", "m", 3.0, 0.25)]
    found = changes(before, after)
    assert [change.ratio for change in found] == [None, float("inf"), None]
    assert [change.after for change in found] == [after[1], after[0], None]
    told = [change.to_dict() for change in found]
    assert [(t["before"], t["after"], t["ratio"]) for t in told] == [
        (0, 3, None), (2, None, None), (1, None, None),
    ]  # fmt: skip
    assert [(t["before_stderr"], t["after_stderr"]) for t in told] == [
        (None, 0.25), (0.5, None), (None, None),
    ]  # fmt: skip
    assert table_of(found) == [
        ["task", "metric", "before", "after", "after/before"],
        ["a", "m     ", "0", "3 ± 0.25", ""],
        ["b", "m     ", "2 ± 0.5", "inf", "inf"],
        ["a", "n     ", "1", "", ""],
    ]
    assert table_of([Change(before[0], None)])[0][2:] == ["value"]
