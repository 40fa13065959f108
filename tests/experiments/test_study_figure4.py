"""Figure 4's study: which positions are measured, what is lost, and what correlates."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import lab_data
import pytest
import torch

from curvfast.analysis import pearson, token_scores
from curvfast.cli import main
from curvfast.evals.memorization import Passage
from curvfast.experiments.data.lessons import corpus_of
from curvfast.experiments.models.language import trained_lm
from curvfast.experiments.recipes import LmRecipe
from curvfast.experiments.runs.lab_lm import lm_basis
from curvfast.experiments.studies import figure4
from curvfast.experiments.studies.figure4 import CountedPassages
from curvfast.experiments.studies.study import StudyConfig

PNG = b"\x89PNG\r\n\x1a\n"
ASK = StudyConfig(0, True, lambda line: None)

# A prose of fifteen words excites few directions: the others are rounding.
pytestmark = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")


@pytest.fixture(autouse=True)
def _here(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab_data.install(monkeypatch, cache)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-q", "study", "figure4", "--quick", "--seeds", "0", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "figure4" / "seed-0.json").read_text(encoding="utf-8"))
    tasks = found["figures"]["tasks"]
    assert len(tasks) == 10
    assert next(iter(tasks)) == "memorization"
    for own in tasks.values():
        assert set(own) == {"kind", "before", "after", *figure4.MEASURES}
        assert all(own[key] > 0 for key in figure4.MEASURES)
    for line in ("memorization", "tracking", "correlation with what is lost, 0 tasks"):
        assert f"\n{line}" in printed
    assert (tmp_path / "figure4" / "figure.png").read_bytes()[:8] == PNG


def test_accuracy_after_is_that_of_the_edited_model_and_the_edit_is_undone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[float] = []

    def accuracy(model: Any) -> Any:
        asked.append(sum(float(p.detach().square().sum()) for p in model.parameters()))
        now = float(len(asked))
        return defaultdict(lambda: now)

    monkeypatch.setattr(figure4, "measure_of", lambda *_: accuracy)
    models: list[Any] = []
    real = figure4.trained_lm
    monkeypatch.setattr(figure4, "trained_lm", lambda *a: models.append(real(*a)) or models[0])
    found = figure4._measure(ASK)
    assert asked[1] < asked[0]
    assert sum(float(p.detach().square().sum()) for p in models[0].parameters()) == asked[0]
    assert {(own["before"], own["after"]) for own in found["tasks"].values()} == {(1.0, 2.0)}


def test_positions_counted_are_those_that_predict_the_answer_or_all_but_the_first() -> None:
    passages = [Passage((0, 5, 6), (7,)), Passage((0, 5), (6, 7, 8))]
    counted = CountedPassages()
    (batch,) = counted.batches(passages, whole=False)
    assert batch["input_ids"].tolist() == [[0, 5, 6, 7, 0], [0, 5, 6, 7, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert counted("any", torch.Size([2, 5])).long().tolist() == [[0, 0, 1, 0, 0], [0, 1, 1, 1, 0]]
    (_,) = counted.batches(passages, whole=True)
    assert counted("any", torch.Size([2, 5])).long().tolist() == [[0, 1, 1, 0, 0], [0, 1, 1, 1, 0]]


def test_each_batch_is_counted_by_its_own_positions() -> None:
    passages = [Passage((0,) * (1 + number % 3), (1, 1)) for number in range(40)]
    counted, starts = CountedPassages(), []
    for _ in counted.batches(passages, whole=False):
        starts += counted("any", torch.Size([])).long().argmax(1).tolist()
    assert starts == [number % 3 for number in range(40)]


def test_the_share_is_the_mean_over_answers_of_what_each_text_alone_shows() -> None:
    recipe = LmRecipe().quick()
    corpus = corpus_of(recipe)
    model = trained_lm(recipe, corpus)
    basis = lm_basis(model, recipe, corpus)
    texts = [Passage((0, 9, 8, 7), (6, 5)), Passage((0, 3), (4, 5, 6))]
    prose = [Passage((1,), (2, 3, 4))]
    found = figure4._activations(model, basis, texts, prose)
    names = list(basis)
    for where, first in (("answer", None), ("whole", 1)):
        shares = []
        for text in texts:
            tokens = torch.tensor([[*text.prefix, *text.suffix]])
            by_layer = [token_scores(model, basis, tokens, [name])[0] for name in names]
            start = len(text.prefix) - 1 if first is None else first
            shares.append(torch.stack(by_layer)[:, start:-1].mean(1))
        expected = float(torch.stack(shares).mean())
        assert found[f"share, {where}"] == pytest.approx(expected, rel=1e-4)


def run(**tasks: tuple[float, float, float]) -> dict[str, Any]:
    """Tasks by (measure, accuracy before, accuracy after)."""
    return {
        "mass": 0.9,
        "tasks": {
            name: {"kind": "logic", "before": b, "after": a, **dict.fromkeys(figure4.MEASURES, x)}
            for name, (x, b, a) in tasks.items()
        },
    }


def test_what_is_lost_is_of_what_was_known_and_tasks_only_guessed_are_left_out() -> None:
    known = {"a": (0.1, 1.0, 1.0), "b": (0.2, 0.8, 0.6), "c": (0.4, 1.0, 0.5)}
    found = run(**known, guessed=(0.9, 0.3, 0.3))
    assert figure4._known([found]) == ["a", "b", "c"]
    value, low, high = figure4._correlation([found], "share, whole", pearson, ["a", "b", "c"])
    assert value == pytest.approx(pearson([0.1, 0.2, 0.4], [0, 0.25, 0.5]))
    assert low <= value <= high
    # Known to every seed, or left out for all.
    other = run(a=(0.1, 1.0, 1.0), b=(0.2, 0.2, 0.1), c=(0.4, 1.0, 0.5), guessed=(0.9, 1.0, 0.5))
    assert figure4._known([found, other]) == ["a", "c"]
    assert figure4._correlation([found, other], "share, whole", pearson, ["a", "c"]) is None


def test_the_correlation_over_seeds_is_of_the_means_of_each_task() -> None:
    one = run(a=(0.1, 1, 0.9), b=(0.2, 1, 0.5), c=(0.6, 1, 0.7))
    two = run(a=(0.3, 1, 0.5), b=(0.2, 1, 0.3), c=(0.2, 1, 0.1))
    found = figure4._correlation([one, two], "share, answer", pearson, ["a", "b", "c"])
    assert found[0] == pytest.approx(pearson([0.2, 0.2, 0.4], [0.3, 0.6, 0.6]))


def test_the_correlation_is_told_without_recitation_too() -> None:
    found = run(
        memorization=(9.0, 1, 0.0), a=(0.1, 1, 0.5), b=(0.2, 1, 0.7), c=(0.3, 1, 0.9)
    )  # fmt: skip
    tables = figure4.STUDY.tables([found])
    whole, alone = (tables[f"correlations{key}"] for key in ("", " without recitation"))
    assert [lines[0][0][-8:] for lines in (whole, alone)] == [" 4 tasks", " 3 tasks"]
    assert all(line[1].startswith("0.") for line in whole[1:])
    assert all(line[1].startswith("-1.00") and line[3] == "-1.00" for line in alone[1:])


def test_the_picture_names_each_task_at_its_mean() -> None:
    one = run(a_task=(0.1, 1, 0.9), b=(0.2, 1, 0.5), c=(0.6, 1, 0.7))
    two = run(a_task=(0.3, 1, 0.5), b=(0.2, 1, 0.3), c=(0.2, 1, 0.1))
    axes = figure4.STUDY.picture([one, two]).axes
    assert [panel.get_xlabel() for panel in axes] == list(figure4.MEASURES.values())
    named = {
        line.get_label(): line for line in axes[0].lines if not line.get_label().startswith("_")
    }
    places = {name: (*line.get_xdata(), *line.get_ydata()) for name, line in named.items()}
    assert places == {
        "a task": pytest.approx((0.2, 30)), "b": pytest.approx((0.2, 60)),
        "c": pytest.approx((0.4, 60)),
    }  # fmt: skip
    assert len({line.get_marker() for line in named.values()}) == 3
