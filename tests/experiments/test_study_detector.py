"""The detector's study: what is judged played no part in choosing the layer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lab_data
import pytest
import torch

from curvfast.analysis import TextScores, auc
from curvfast.cli import main
from curvfast.evals.perplexity import perplexity
from curvfast.experiments.recipes import Recipe
from curvfast.experiments.studies import detector
from curvfast.experiments.studies.detector import Passages, telling
from curvfast.experiments.studies.subjects import demo_subject

PNG = b"\x89PNG\r\n\x1a\n"

# A prose of fifteen words excites few directions: the others are rounding.
pytestmark = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")


@pytest.fixture(autouse=True)
def _here(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab_data.install(monkeypatch, cache)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-q", "study", "detector", "--quick", "--seeds", "0", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("\ndetector: memorized text told without labels")
    path = tmp_path / "detector" / "seed-0.json"
    for own in json.loads(path.read_text(encoding="utf-8"))["figures"].values():
        assert own["texts"] == [8, 8]
        assert len(own["folds"]) == 2
        assert own["chosen"] == pytest.approx(
            sum(fold["auc"] for fold in own["folds"]) / 2, abs=1e-4
        )
        assert len(own["layers"]) == 6
        for text in (own["shown"]["by heart"], own["shown"]["never seen"]):
            assert len(text["pieces"]) == len(text["scores"]) == 56
    for label in detector.MEASURES.values():
        assert f"\n{label}" in printed
    assert (tmp_path / "detector" / "figure.png").read_bytes()[:8] == PNG


def test_a_layer_chosen_on_one_half_is_judged_on_the_other() -> None:
    """Each layer tells one half alone: judged where it was chosen, it would look perfect."""
    known = torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 4, dtype=torch.float64)
    scores = TextScores(("one", "two"), known, 0.6)
    unseen = TextScores(("one", "two"), torch.full((8, 2), 0.5, dtype=torch.float64), 0.6)
    assert detector._judged(scores, unseen, 0) == {"layer": "one", "auc": 0.0}
    assert detector._judged(scores, unseen, 1) == {"layer": "two", "auc": 0.0}


def test_halves_share_no_text_and_are_of_both_sources() -> None:
    scores = TextScores(("one",), torch.arange(8.0)[:, None], 0.6)
    halves = [detector._half(scores, half).shares.flatten().tolist() for half in (0, 1)]
    assert halves == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_sources_are_judged_apart_and_the_loss_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = demo_subject(Recipe().quick(), lambda line: None)
    known = torch.tensor([10.0, 11, 12, 13, 0, 1, 2, 3])
    unseen = torch.tensor([10.0, 11, 12, 13, 100, 101, 102, 103])
    passages = subject.passages.tolist()

    def of(rows: torch.Tensor) -> torch.Tensor:
        return known if rows.tolist() == passages else unseen

    def scores(model: Any, basis: Any, batches: Any) -> TextScores:
        own = of(torch.cat(list(batches))).double()
        return TextScores(("model.layers.0.mlp.gate_proj",), own[:, None], 0.6)

    monkeypatch.setattr(detector, "memorization_scores", scores)
    monkeypatch.setattr(detector, "_losses", lambda model, rows: -of(rows))
    found = detector._told(subject)
    assert found["speeches"] == 0.5
    assert found["bible"] == 0.0
    assert found["all"] == found["loss"] == auc(known, unseen)


def test_losses_are_those_of_perplexity() -> None:
    subject = demo_subject(Recipe().quick(), lambda line: None)
    found = detector._losses(subject.model, subject.passages)
    assert found.shape == (8,)
    one = perplexity(subject.model, [subject.passages[5:6]])
    assert math.exp(found[5]) == pytest.approx(one, rel=1e-5)


def test_the_text_shown_is_neither_the_easiest_nor_the_hardest() -> None:
    assert detector._middle(torch.tensor([5.0, 1.0, 3.0])) == 2
    assert detector._middle(torch.tensor([5.0, 1.0, 3.0, 4.0])) == 2


def test_a_text_shown_has_a_score_for_each_of_its_tokens_alone() -> None:
    subject = demo_subject(Recipe().quick(), lambda line: None)
    layer = next(iter(subject.basis))
    text = subject.passages[3]
    shown = detector._shown(subject, text, layer)
    assert "".join(shown["pieces"]) == subject.corpus.tokenizer.decode(text[1:].tolist())
    own = detector.token_scores(subject.model, subject.basis, text[None], layer)[0]
    assert shown["scores"] == own[1:].tolist()


def test_the_picture_writes_every_letter_inside_its_panel() -> None:
    pieces = ["all", " men", "\n", "x" * 30, " and", "y" * 30, "z"]
    text = Passages(pieces, [0.0, 0.5, 1.0, 0.2, 0.3, 0.4, 0.5])
    curves = {"model": [{"layers": {"a.0.up_proj": 0.9, "a.1.up_proj": 0.7}, "chosen": 0.8}]}
    upper, lower = telling(curves, {"by heart": text}).axes
    assert list(upper.lines[0].get_ydata()) == [0.9, 0.7]
    assert "0.800" in upper.get_title(loc="left")
    letters = "".join(own.get_text() for own in lower.texts)
    assert letters.split() == "".join(pieces).replace("\n", "¶").split()
    width, height = lower.get_xlim()[1], lower.get_ylim()[0]
    for own in lower.texts:
        assert 0 < own.get_position()[0] < width
        assert 0 < own.get_position()[1] < height
    # The likeliest token is the reddest, the least likely has no ground.
    assert [patch.get_alpha() for patch in lower.patches[:3]] == pytest.approx([0, 0.45, 0.9])
