"""The study of Table 1: matched at one perplexity, weights put back, passages by kind and half."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lab_data
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curvfast.analysis import StressReport
from curvfast.baselines import BalancedSubnet
from curvfast.cli import main
from curvfast.evals.memorization import Passage
from curvfast.experiments.recipes import Recipe
from curvfast.experiments.studies import recital, table1
from curvfast.experiments.studies.recital import Table1Model, quarters
from curvfast.experiments.studies.table1 import at_perplexity

# Rounding on a text of fifteen words is not what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")
QUARTERS = ["speeches_first", "speeches_second", "bible_first", "bible_second"]
MEASURES = {f"{q}_{score}" for q in QUARTERS for score in ("strict", "loose", "levenshtein")}
MEASURES |= {"perplexity", "perplexity_bible", "ndcg", "cpu_seconds"}


@pytest.fixture(autouse=True)
def _here(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab_data.install(monkeypatch, cache)
    monkeypatch.setattr(recital, "bible", lambda: lab_data.prose(98, 14_000))


@pytest.fixture
def subject() -> Table1Model:
    return recital.recital(Recipe().quick())


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def point(perplexity: float, strict: float) -> dict[str, float]:
    return {"perplexity": perplexity, "strict": strict}


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["-q", "study", "table1", "--quick", "--seeds", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    file = tmp_path / "table1" / "seed-1.json"
    found = json.loads(file.read_text(encoding="utf-8"))["figures"]
    assert set(found["base"]) == MEASURES
    assert found["base"]["ndcg"] == pytest.approx(1)
    assert set(found["curves"]) == {"kfac", "svd", "bsn", "bsn_speeches"}
    assert found["recipe"]["seed"] == 1
    for edit in ("kfac", "svd"):
        points = found["curves"][edit]
        assert [p["mass"] for p in points] == list(table1.MASSES)
        assert all(p.keys() >= MEASURES for p in points)
        assert all(p["cpu_seconds"] > 0 for p in points)
    sizes = [[p["kept_fraction"] for p in found["curves"][edit]] for edit in ("kfac", "svd")]
    assert sizes[0] == sizes[1] == sorted(sizes[0], reverse=True)
    for rival in ("bsn", "bsn_speeches"):
        assert [p["ratio"] for p in found["curves"][rival]] == list(table1.RATIOS)
    own = next(p for p in found["curves"]["kfac"] if p["mass"] == found["mass"])
    matched = found["matched"]["kfac"]["kfac"]
    assert matched == {key: own[key] for key in matched}
    assert found["stress"]["kfac"]["offsets_are_void"]
    assert file.stat().st_size < 200_000
    assert (tmp_path / "table1" / "figure.png").is_file()
    for line in ("unedited", "K-FAC edit", "right 16", "as set, by half"):
        assert f"\n{line}" in printed


def test_passages_fall_into_kinds_and_halves_each_once() -> None:
    passages = [Passage((0, i), (i,)) for i in range(12)]
    found = quarters(passages)
    assert list(found) == QUARTERS
    assert [[p.suffix[0] for p in own] for own in found.values()] == [
        [0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11],
    ]  # fmt: skip


def test_scripture_holds_nothing_that_passages_are_drawn_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = Recipe().quick()
    corpus = recital.load_corpus(recipe)
    monkeypatch.setattr(recital, "bible", lambda: "x" * recipe.bible_characters + "yz " * 40_000)
    windows = recital.scripture(recipe, corpus)
    assert windows.shape[1] == recipe.length
    read = {corpus.tokenizer.decode(row) for row in windows.tolist()}
    assert not any("x" in text for text in read)
    assert 100 < len(windows) <= 120


def test_a_rival_is_told_its_passages_alone_and_weights_are_put_back(
    subject: Table1Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = weights(subject.model)
    seen: list[Any] = []
    forget = BalancedSubnet.forget

    def spying(self, model, memorized, clean, layers, **options):
        seen.extend(memorized)
        report = forget(self, model, memorized, clean, layers, **options)
        assert not same(before, weights(model))
        return report

    monkeypatch.setattr(BalancedSubnet, "forget", spying)
    rival = replace(BalancedSubnet.for_small_models(), epochs=1, ratio=0.3)
    told = table1.TOLD["bsn_speeches"]
    found = table1._subnet(subject, rival, told, 0)
    assert seen == subject.passages["speeches_first"]
    assert found["ratio"] == 0.3
    assert found["ndcg"] < 1
    assert same(before, weights(subject.model))


def test_edits_put_weights_back_and_stress_the_reported_one(
    subject: Table1Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = weights(subject.model)
    changed = []

    def stressed(self: Table1Model) -> dict[str, Any]:
        changed.append(not same(before, weights(self.model)))
        return {"called": len(changed)}

    monkeypatch.setattr(Table1Model, "stressed", stressed)
    _, found = table1._edits(subject, Recipe().quick())
    assert found == {"called": 1}
    assert changed == [True]
    assert same(before, weights(subject.model))


def test_any_prompt_counts_the_best_of_each_passage(
    subject: Table1Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def stress(model: Any, passages: list[Passage], **options: Any) -> StressReport:
        given.update(options, passages=passages)
        lengths, possible = torch.tensor([[3, 0], [0, 2], [1, 1]]), torch.tensor([[3, 2]] * 3)
        return StressReport(("as is", "right 1"), lengths, possible, {}, 1e-3)

    monkeypatch.setattr(recital, "stress", stress)
    found = subject.stressed()["variants"]
    third = pytest.approx(1 / 3)
    assert found["as is"] == {"recited": third, "length": pytest.approx(4 / 3)}
    assert found["right 1"] == {"recited": third, "length": 1.0}
    assert found["any"] == {"recited": pytest.approx(2 / 3), "length": 2.0}
    assert len(given["passages"]) == len(given["contexts"]) == 8
    prose = torch.cat(list(subject.prose)).tolist()
    assert all(any(own == row[:32] for row in prose) for own in given["contexts"])


@given(st.floats(1, 100), st.lists(st.floats(0.1, 50), min_size=1, max_size=5), st.floats(0, 1))
def test_a_curve_is_linear_between_strengths(
    start: float, rises: list[float], share: float
) -> None:
    heights = [start]
    for rise in rises:
        heights.append(heights[-1] + rise)
    points = [point(height, 1 / (1 + i)) for i, height in enumerate(heights)]
    one, two = points[-2:]
    low, high = heights[-2:]
    value = min(max((1 - share) * low + share * high, low), high)
    found = at_perplexity(points[0], points[1:], value)
    assert found is not None
    expected = one["strict"] + share * (two["strict"] - one["strict"])
    assert found["strict"] == pytest.approx(expected, abs=1e-6)
    assert found["perplexity"] == pytest.approx(value)


def test_nothing_is_extrapolated_and_the_first_crossing_counts() -> None:
    base, points = point(10, 1.0), [point(12, 0.5), point(11, 0.4), point(14, 0.0)]
    assert at_perplexity(base, points, 15) is None
    assert at_perplexity(base, points, math.nan) is None
    found = at_perplexity(base, points, 11)
    assert found is not None
    assert found["strict"] == 0.75


def test_tables_say_what_was_not_reached_and_average_over_seeds() -> None:
    def measures(strict: float) -> dict[str, float]:
        return {**{name: strict for name in MEASURES}, "perplexity": 20.0}

    def run(strict: float, reached: bool) -> dict[str, Any]:
        edits = {m: [{**measures(strict), "mass": 0.95}] for m in ("kfac", "svd")}
        rivals = {m: [{**measures(0.0), "ratio": 0.02}] for m in table1.TOLD}
        names = ("kfac", "svd", *table1.TOLD)
        at = {name: measures(strict) if reached or name != "svd" else None for name in names}
        variants = {"variants": {"as is": {"recited": strict, "length": 3.0}}}
        return {
            "base": measures(1.0), "mass": 0.95, "curves": {**edits, **rivals},
            "matched": {"rise": at, "kfac": at}, "stress": {"base": variants, "kfac": variants},
        }  # fmt: skip

    tables = table1.STUDY.tables([run(0.1, True), run(0.3, False)])
    rows = {line[0]: line for line in tables["at +5%"]}
    assert set(rows["truncated SVD"][1:]) == {"-"}
    assert rows["K-FAC edit"][1] == "20 ± 14"
    assert rows["K-FAC edit"][3] == "0.20 ± 0.14"
    assert rows["unedited"][1] == "100 ± 0"
    rows = {line[0]: line for line in tables["as set, by half"]}
    assert rows["truncated SVD"][1:] == ["20 ± 14"] * 4
    assert rows[table1.LABELS["bsn"]][1:] == ["0 ± 0"] * 4
    assert all(len({len(line) for line in lines}) == 1 for lines in tables.values())
