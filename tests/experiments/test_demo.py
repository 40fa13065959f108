"""The demo from the command line: every step on real text, cut to seconds; the whole is slow."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from curvfast.cli import main
from curvfast.experiments.data.corpus import TokenizedCorpus, load_corpus
from curvfast.experiments.recipes import Recipe
from curvfast.experiments.runs import demo_lm, demo_smollm
from curvfast.hf.small import load
from curvfast.report.curvature import read_curvature
from curvfast.report.recitals import read_passages

MEASURES = {"strict", "loose", "levenshtein", "perplexity", "kept_fraction"}
TASKS = {"closed_book", "open_book", "addition", "times_table"}


@pytest.fixture(scope="module", autouse=True)
def _texts_once() -> Iterator[None]:
    """Lend commands the corpus of an earlier one: most of what a quick demo does is tokenizing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_lm, "load_corpus", corpus_of)
        yield


@functools.cache
def corpus_of(recipe: Recipe) -> TokenizedCorpus:
    return load_corpus(recipe)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder the quick demo writes."""
    out = tmp_path_factory.mktemp("demo") / "out"
    assert main(["--quiet", "demo", "--quick", "--seed", "5", "--out", str(out)]) == 0
    return out


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_results_hold_every_method_every_measure_and_the_sweep(made: Path) -> None:
    found = results(made)
    assert set(found["base"]) == MEASURES
    for point in [found, *found["sweep"]]:
        for method in ("kfac", "svd", "random"):
            assert set(point[method]) == MEASURES
            assert all(isinstance(v, float) for v in point[method].values())
        assert len({point[m]["kept_fraction"] for m in ("kfac", "svd", "random")}) == 1
    masses = [point["mass"] for point in found["sweep"]]
    assert masses == sorted(masses)
    assert found["mass"] in masses
    kept = [point["kfac"]["kept_fraction"] for point in found["sweep"]]
    assert kept == sorted(kept)
    assert found["versions"]["torch"] == torch.__version__


def test_the_checkpoint_written_is_the_edited_model(made: Path) -> None:
    model, tokenizer = load(made / "edited")
    found = results(made)
    recipe = Recipe(seed=5).quick()
    # Read anew: a recipe's texts are the same each time.
    corpus = load_corpus(recipe)
    assert torch.equal(corpus.canaries, corpus_of(recipe).canaries)
    assert tokenizer("the people")["input_ids"] == corpus.tokenizer("the people")["input_ids"]
    from curvfast import evaluate

    again = evaluate(model, passages=corpus.passages(), text=corpus.held_out.split(16))
    assert again.perplexity == pytest.approx(found["kfac"]["perplexity"], rel=1e-4)


def test_what_a_report_shows_is_kept_beside_the_results(made: Path) -> None:
    found = results(made)
    assert found["command"] == "curvfast demo --seed 5 --quick"
    layers, provenance = read_curvature(json.loads((made / "curvature.json").read_text("utf-8")))
    stairs = [layer.stairs for layer in layers.values()]
    kept = sum(s.pairs for s in stairs) / sum(s.rows * s.columns for s in stairs)
    assert kept == pytest.approx(found["kfac"]["kept_fraction"])
    assert provenance == found["edit"]["provenance"]["factors"]
    passages, chosen = read_passages(json.loads((made / "passages.json").read_text("utf-8")))
    corpus = corpus_of(Recipe(seed=5).quick())
    rows = [corpus.tokenizer.decode(row) for row in corpus.canaries]
    assert len(passages) == 6
    assert chosen.startswith("6 of 8 ")
    assert [p.prompt + p.truth for p in passages] == [rows[i] for i in (0, 1, 2, 4, 5, 6)]
    assert main(["-q", "report", str(made)]) == 0
    assert "A quick run" in (made / "report.html").read_text("utf-8")


def test_the_picture_is_a_picture(made: Path) -> None:
    assert (made / "frontier.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_table_shows_each_method(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--quick", "--seed", "5"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "", "unedited", "K-FAC edit", "truncated SVD", "random pairs",
    ]  # fmt: skip
    assert len({len(line) for line in lines}) == 1
    assert f"{results(made)['kfac']['perplexity']:.2f}" in lines[2]
    assert "· training" in printed.err


def test_text_is_never_shared_between_training_and_held_out() -> None:
    corpus = corpus_of(Recipe(seed=5).quick())
    stream = " ".join(map(str, corpus.train.tolist()))
    for row in [*corpus.canaries[:4], *corpus.held_out]:
        assert " ".join(map(str, row[:40].tolist())) not in stream


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_recitation_falls_and_perplexity_stays(seed: int) -> None:
    found = demo_lm.run(Recipe(seed=seed, sweep=()), None, lambda line: None)
    base, kfac, svd, random = (found[m] for m in ("base", "kfac", "svd", "random"))
    assert base["strict"] >= 0.80
    assert kfac["strict"] <= 0.05
    assert kfac["perplexity"] < 1.15 * base["perplexity"]
    assert svd["perplexity"] > kfac["perplexity"]
    assert kfac["strict"] <= svd["strict"]
    assert random["perplexity"] > 4 * kfac["perplexity"]


@pytest.mark.slow
def test_a_pretrained_model_forgets_what_it_recites() -> None:
    found = demo_smollm.run(demo_smollm.SmolLMRecipe().quick(), None, lambda line: None)
    assert set(found["base"]) == MEASURES | TASKS == set(found["kfac"])
    assert found["base"]["strict"] >= 0.95
    assert found["kfac"]["strict"] <= 0.30
    assert found["kfac"]["perplexity"] <= 1.35 * found["base"]["perplexity"]
    assert found["kfac"]["open_book"] >= 0.5 * found["base"]["open_book"]
