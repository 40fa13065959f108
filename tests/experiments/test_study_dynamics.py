"""The study of a training's course, cut to seconds, and what it rests on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import lab_data
import pytest
import torch

from curvfast import collect_from, evaluate, memorization_scores
from curvfast.analysis.statistics import auc
from curvfast.cli import main
from curvfast.errors import InputError
from curvfast.experiments.data.corpus import TokenizedCorpus, load_corpus
from curvfast.experiments.models import language as kept
from curvfast.experiments.models.language import restored, snapshots, trained_model, untrained
from curvfast.experiments.recipes import Recipe
from curvfast.experiments.studies import dynamics
from curvfast.experiments.studies.study import to_six_digits
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.kfac.layer_basis import LayerBasis

PNG = b"\x89PNG\r\n\x1a\n"
RECIPE = Recipe(seed=3).quick()
STEPS = [0, 1, 2, 3, 4, 5, 6]

# A few hundred rows of random text: float32 sums of lesser rank.
pytestmark = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")


@pytest.fixture(scope="module", autouse=True)
def _here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        lab_data.install(patch, tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def corpus() -> TokenizedCorpus:
    return load_corpus(RECIPE)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the study of seed 3 writes."""
    out = tmp_path_factory.mktemp("study")
    command = ["--quiet", "study", "dynamics", "--quick", "--seeds", "3", "--out", str(out)]
    assert main(command) == 0
    return out


@pytest.fixture(scope="module")
def found(out: Path) -> dict[str, Any]:
    text = (out / "dynamics" / "seed-3.json").read_text(encoding="utf-8")
    return dict(json.loads(text)["figures"])


def same(one: Any, two: Any) -> bool:
    pairs = zip(one.named_parameters(), two.named_parameters(), strict=True)
    return all(a == b and torch.equal(p, q) for (a, p), (b, q) in pairs)


def test_the_first_weights_kept_are_the_untrained_and_the_last_the_demos(
    corpus: TokenizedCorpus,
) -> None:
    """Watching a training changes no bit of it."""
    found = snapshots(RECIPE, corpus, STEPS)
    assert list(found) == STEPS
    assert same(restored(RECIPE, found[0]), untrained(RECIPE))
    assert same(restored(RECIPE, found[RECIPE.steps]), trained_model(RECIPE, corpus))
    models = [restored(RECIPE, weights) for weights in found.values()]
    assert not any(same(one, two) for one, two in pairwise(models))
    assert not any(model.training for model in models)


def test_weights_are_kept_by_their_steps_and_not_trained_again(
    corpus: TokenizedCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = snapshots(RECIPE, corpus, [2, 0, 2])
    assert list(first) == [0, 2]
    monkeypatch.setattr(kept, "train", None)
    again = snapshots(RECIPE, corpus, [0, 2])
    for step, weights in first.items():
        assert list(again[step]) == list(weights)
        assert all(torch.equal(again[step][name], weights[name]) for name in weights)
    with pytest.raises(TypeError):
        snapshots(RECIPE, corpus, [0, 3])


@pytest.mark.parametrize("steps", [[], [-1, 2], [RECIPE.steps + 1]])
def test_steps_that_a_training_does_not_have_are_refused(
    corpus: TokenizedCorpus, steps: list[int]
) -> None:
    with pytest.raises(InputError, match="each from 0 to 6"):
        snapshots(RECIPE, corpus, steps)


def test_unseen_passages_are_of_the_same_sources_and_nowhere_in_training(
    corpus: TokenizedCorpus,
) -> None:
    assert corpus.controls.shape == corpus.canaries.shape
    stream = " ".join(map(str, corpus.train.tolist()))
    scripture = lab_data.prose(99, 2000)
    half = len(corpus.controls) // 2
    for number, row in enumerate(corpus.controls):
        assert not (corpus.canaries == row).all(1).any()
        text = corpus.tokenizer.decode(row)
        assert (text in scripture) == (number >= half)
        assert " ".join(map(str, row.tolist())) not in stream


def test_moments_looked_at_are_even_and_hold_both_ends() -> None:
    assert dynamics.checkpoints(450) == [0, 56, 112, 169, 225, 281, 338, 394, 450]
    assert dynamics.checkpoints(6) == STEPS


def test_figures_are_of_every_moment(found: dict[str, Any], corpus: TokenizedCorpus) -> None:
    assert [point["step"] for point in found["checkpoints"]] == STEPS
    assert found["mass"] == RECIPE.mass
    assert found["exposures"] == 1.0
    weights = snapshots(RECIPE, corpus, STEPS)
    for step in (0, 6):
        model = restored(RECIPE, weights[step])
        point = found["checkpoints"][step]
        again = evaluate(model, passages=corpus.passages(), text=corpus.held_out.split(16))
        assert point["base"] == to_six_digits(again.to_dict())
        alone = evaluate(model, text=dynamics.with_start(corpus.canaries).split(16))
        assert point["planted_perplexity"] == pytest.approx(alone.perplexity, rel=1e-5)
    for point in found["checkpoints"]:
        assert set(point["auc"]) == set(point["ratio"]) == set(dynamics.READS)
        assert len(point["spectrum"]) == 3 * RECIPE.layers
        assert set(point["kfac"]) == set(point["svd"]) == {*point["base"], "kept_fraction"}
        kept = [layer["kept"] for layer in point["spectrum"].values()]
        # All layers of the cut recipe are of one size.
        assert point["kfac"]["kept_fraction"] == pytest.approx(sum(kept) / len(kept), rel=1e-4)
        assert point["fixed"] != point["kfac"]
    # What was shown is predicted better than its like.
    last = found["checkpoints"][-1]
    assert last["planted_perplexity"] < last["unseen_perplexity"]


def test_tables_and_picture_have_every_moment(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamics, "snapshots", None)
    assert main(["study", "dynamics", "--quick", "--seeds", "3", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for heading in ("text", "spectrum, ρ = 0.95", "planted against unseen", "after an edit"):
        lines = printed.split(f"\n{heading}\n")[1].split("\n\n")[0].splitlines()
        assert [line.split()[0] for line in lines] == ["step", *map(str, STEPS)]
    assert (out / "dynamics" / "figure.png").read_bytes()[:8] == PNG


def test_a_spectrum_is_told_in_shares_of_each_layer() -> None:
    def layer(values_g: list[float], values_a: list[float]) -> LayerBasis:
        return LayerBasis(
            values_a=torch.tensor(values_a, dtype=torch.float64),
            vectors_a=torch.eye(len(values_a)),
            values_g=torch.tensor(values_g, dtype=torch.float64),
            vectors_g=torch.eye(len(values_g)),
        )

    basis = Eigenbasis(
        {"flat": layer([1.0] * 4, [1.0] * 5), "steep": layer([3.0, 1.0], [2.0, 1.0])}
    )
    found = dynamics.spectrum_figures(basis, 0.5)
    # Equal pairs are kept together.
    expected = {"rank_a": 1.0, "rank_g": 1.0, "kept": 1.0, "flattest_half": 0.5}
    assert found["flat"] == pytest.approx(expected)
    # Pairs of 6, 3, 2 and 1; exp(H(2/3, 1/3)) = 1.890 of 2, exp(H(3/4, 1/4)) = 1.755 of 2.
    expected = {"rank_a": 0.945, "rank_g": 0.8774, "kept": 0.25, "flattest_half": 0.25}
    assert found["steep"] == pytest.approx(expected, abs=1e-4)


def test_equal_sets_of_texts_are_not_told_apart_and_order_matters(corpus: TokenizedCorpus) -> None:
    model = untrained(RECIPE).eval()
    basis = collect_from(model, [corpus.held_out], progress=False).eigh()
    one, two = (dynamics.with_start(rows) for rows in (corpus.canaries, corpus.controls))
    alike = dynamics._separation(model, basis, one, one)
    assert set(alike["auc"].values()) == {0.5}
    assert all(ratio == [1.0] * 4 for ratio in alike["ratio"].values())
    there, back = (dynamics._separation(model, basis, *each) for each in ((one, two), (two, one)))
    for name in dynamics.READS:
        assert there["auc"][name] == pytest.approx(1 - back["auc"][name])
        assert there["auc"][name] != 0.5
    scores = [memorization_scores(model, basis, [rows], progress=False) for rows in (one, two)]
    assert there["auc"]["hidden"] == auc(*(each.of("*.down_proj") for each in scores))


def test_numbers_are_cut_to_six_digits_wherever_they_stand() -> None:
    value = {"a": [1 / 3, 7, {"b": 1234567.8}], "c": True, "d": ("x", 2.0)}
    assert to_six_digits(value) == {
        "a": [0.333333, 7, {"b": 1234570.0}],
        "c": True,
        "d": ["x", 2.0],
    }
