"""The study of single examples, cut to seconds, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import lab_data
import pytest
import torch

from curvfast.cli import main
from curvfast.experiments.studies import examples, inversion
from curvfast.experiments.studies.study import StudyConfig
from curvfast.model.rows import IGNORED_LABEL

# Factors of models cut to seconds lack rank, which is of no matter here.
pytestmark = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")

ASK = StudyConfig(0, True, lambda line: None)
GROUPS = ["memorized", "seen", "unseen"]


@pytest.fixture(autouse=True)
def _here(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab_data.install(monkeypatch, cache)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["-q", "study", "inversion", "--quick", "--seeds", "0", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    for title in ("ViT, wrong labels", "LM, recited passages", "Fisher share in removed pairs"):
        assert title in printed
    path = tmp_path / "inversion" / "seed-1.json"
    found = json.loads(path.read_text(encoding="utf-8"))["figures"]
    assert list(found) == list(inversion.SUBJECTS)
    for own in found.values():
        assert list(own["examples"]) == GROUPS
        for group in own["examples"].values():
            assert list(group) == list(inversion.MEASURES)
            assert len({len(values) for values in group.values()}) == 1
            assert all(0 <= share <= 1 for key in ("flat", "flat_own") for share in group[key])
        assert all(0 <= area <= 1 for areas in own["auc"].values() for area in areas.values())
    assert (tmp_path / "inversion" / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_pictures_are_noisy_clean_and_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "_PICTURES", 30)
    monkeypatch.setattr(examples, "_fitted", lambda model, group, shift: group["labels"] >= 0)
    found = examples.pictures(ASK)
    split = examples.lab_vit(ASK).split
    given = {
        tuple(pixels.flatten().tolist()): label
        for pixels, label in zip(split.train.pixels, split.given.tolist(), strict=True)
    }
    for name, batches in found.batches.items():
        pixels = torch.cat([batch["pixel_values"] for batch in batches])
        labels = torch.cat([batch["labels"] for batch in batches]).tolist()
        truth = [int(picture.flatten()[:10].argmax()) for picture in pixels]
        known = [given.get(tuple(picture.flatten().tolist())) for picture in pixels]
        assert len(labels) == 30
        if name == "unseen":
            assert known == [None] * 30
        else:
            assert known == labels
        wrong = [one != two for one, two in zip(labels, truth, strict=True)]
        assert wrong == 30 * [name == "memorized"]


def test_texts_are_planted_trained_on_and_of_the_same_sources() -> None:
    found = examples.texts(ASK)
    subject = examples.demo_lm(ASK)
    recipe, corpus = subject.recipe, subject.corpus
    ids = {
        name: torch.cat([batch["input_ids"] for batch in batches])[:, 1:]
        for name, batches in found.batches.items()
    }
    planted = set(map(tuple, corpus.canaries.tolist()))
    rows = {name: set(map(tuple, own.tolist())) for name, own in ids.items()}
    assert rows["memorized"] == planted
    assert not rows["unseen"] & planted
    text = " ".join(map(str, corpus.train.tolist()))
    assert all(" ".join(map(str, row)) in text for row in rows["seen"])
    for batches in found.batches.values():
        for batch in batches:
            scored = batch["labels"] != IGNORED_LABEL
            assert scored[:, 1 + recipe.prefix :].all()
            assert not scored[:, : 1 + recipe.prefix].any()
            assert torch.equal(batch["labels"][scored], batch["input_ids"][scored])


def test_only_what_is_fitted_counts_as_memorized() -> None:
    logits = torch.eye(5)[torch.tensor([[1, 2, 3], [1, 4, 3]])]

    class Model(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return logits[: len(input_ids)]

    group = {"input_ids": torch.zeros(2, 3).long(), "labels": torch.tensor([[-100, 1, 2]] * 2)}
    assert examples._fitted(Model(), group, 1).tolist() == [True, False]
    single = {"input_ids": group["input_ids"], "labels": torch.tensor([[1, 2, -100]] * 2)}
    assert examples._fitted(Model(), single, 0).tolist() == [True, False]
