"""Figure 2's study: what is compared with what, at which positions, and how it is shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lab_data
import pytest
import torch

from curvfast.cli import main
from curvfast.experiments.data import corpus as texts
from curvfast.experiments.models.vit import split_of
from curvfast.experiments.recipes import RECIPES, Recipe
from curvfast.experiments.studies import figure2
from curvfast.experiments.studies.figure2 import activations, short
from curvfast.experiments.studies.study import StudyConfig, to_four_decimals

PNG = b"\x89PNG\r\n\x1a\n"
COMPARED = ["language, suffix", "language, passage", "vision, all", "vision, cls"]

# A prose of fifteen words excites few directions: the others are rounding.
pytestmark = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")


@pytest.fixture(autouse=True)
def _here(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab_data.install(monkeypatch, cache)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-q", "study", "figure2", "--quick", "--seeds", "0", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "figure2" / "seed-0.json").read_text(encoding="utf-8"))
    assert list(found["figures"]) == COMPARED
    for name, curves in found["figures"].items():
        assert list(curves) == ["index", "mass"]
        layers = curves["index"]["layers"]
        assert len(layers) == (6 if name.startswith("language") else 4)
        for own in layers.values():
            for ratio, low, high in zip(own["ratio"], own["low"], own["high"], strict=True):
                assert low <= ratio <= high
                assert ratio == round(ratio, 4)
        assert f"\n{name}, by mass\n" in printed
    assert (tmp_path / "figure2" / "figure.png").read_bytes()[:8] == PNG


def test_positions_are_those_that_predict_the_suffix() -> None:
    keep = figure2._between(2, 4)("any layer", torch.Size([2, 6]))
    assert keep.tolist() == [[False, False, True, True, False, False]] * 2


def test_language_is_compared_where_the_suffix_is_predicted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []

    def ratios(model: Any, basis: Any, known: Any, clean: Any, rows: Any) -> dict[str, Any]:
        seen.append((torch.cat(known), torch.cat(clean), rows))
        return {}

    monkeypatch.setattr(figure2, "_ratios", ratios)
    recipe = Recipe().quick()
    found = figure2._language(StudyConfig(0, True, lambda line: None))
    assert list(found) == COMPARED[:2]
    corpus = texts.load_corpus(recipe)
    for (known, clean, rows), first in zip(seen, (recipe.prefix, 1), strict=True):
        assert torch.equal(known[:, 1:], corpus.canaries)
        assert torch.equal(clean[:, 1:], corpus.controls)
        assert known[:, 0].eq(0).all()
        assert clean[:, 0].eq(0).all()
        # A position predicts the token after it; the last of a text predicts nothing.
        positions = rows("any", known.shape)[0].nonzero().flatten().tolist()
        assert positions == list(range(first, recipe.prefix + recipe.suffix))


def test_pictures_compared_are_those_learnt_with_a_wrong_label_and_with_a_right_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []

    def ratios(model: Any, basis: Any, known: Any, clean: Any, rows: Any) -> dict[str, Any]:
        seen.append(
            [torch.cat([b["pixel_values"] for b in part]) for part in (known, clean)] + [rows]
        )
        return {}

    recipe = replace(RECIPES["mnist"], seed=0).quick()
    split = split_of(recipe)
    # This model gives every other picture the label it was taught.
    learnt = torch.arange(len(split.train)) % 2 == 0
    given = torch.where(learnt, split.given, (split.given + 1) % 10)
    monkeypatch.setattr(figure2, "classify", lambda model, images: given)
    monkeypatch.setattr(figure2, "_ratios", ratios)
    found = figure2._vision(StudyConfig(0, True, lambda line: None))
    assert list(found) == COMPARED[2:]
    for known, clean, _ in seen:
        assert torch.equal(known, split.train.pixels[learnt & split.noisy])
        assert torch.equal(clean, split.train.pixels[learnt & ~split.noisy])
    assert seen[0][2] is None
    assert seen[1][2]("any", torch.Size([1, 5])).tolist() == [[True] + [False] * 4]


def curve(*ratio: float | None) -> dict[str, Any]:
    ends = {
        key: [None if v is None else v + step for v in ratio]
        for key, step in (("low", -0.1), ("high", 0.1))
    }
    return {"ratio": list(ratio), **ends}


def test_a_row_counts_the_seeds_whose_interval_holds_no_1() -> None:
    runs = [curve(0.8, 1.0, None, 1.3), curve(0.95, 1.0, 1.0, 1.05), curve(0.8, 1.0, None, None)]
    cells = figure2._row(runs)
    assert cells[-1] == "2 below, 1 above"
    assert cells[2] == "1.00"
    assert cells[3] == "1.18 ± 0.18"


def test_the_picture_shows_one_curve_for_layers_that_read_one_tensor() -> None:
    one, two = curve(0.9, 1, 1, 1.2), curve(0.7, 1, 1, 1.4)
    names = [f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")]
    run = {
        "any": {
            "index": {
                "bands": [0.1, 0.25, 0.5, 1],
                "layers": dict(zip(names, (one, one, two), strict=True)),
            }
        }
    }
    (axes,) = activations([run]).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0 gate, up", "0 down"]
    drawn = [list(container.lines[0].get_ydata()) for container in axes.containers]
    assert drawn == [[0.9, 0.7], [1.2, 1.4]]
    assert axes.get_legend_handles_labels()[1] == [
        "most curved (0-10 %)", "flattest (50-100 %)",
    ]  # fmt: skip
    assert short("vit.layers.11.mlp.fc1") == "11 fc1"


def test_figures_are_kept_to_four_decimals() -> None:
    assert to_four_decimals({"a": [1 / 3, float("nan")], "b": (2, "c")}) == {
        "a": [0.3333, None],
        "b": [2, "c"],
    }
