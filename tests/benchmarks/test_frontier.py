"""The comparison of ways to forget: what it measures, that it goes on, and how it interpolates."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from cases import VOCABULARY, llama
from frontier import run, table
from frontier.matched import MEASURES, at_rise, furthest, over_seeds
from frontier.methods import METHODS, Method, edit_by, forget_by
from frontier.settings import SETTINGS, Setting, halves, restore, trained
from hypothesis import given
from hypothesis import strategies as st

import curvfast
from curvfast import Passage
from curvfast.baselines import RIVALS, RandomPairs, TruncatedSVD
from curvfast.evals.generation import greedy
from curvfast.kfac.importance import Importance

LM = METHODS["lm"]


def tiny(seed: int, dry_run: bool) -> Setting:
    """A model that recites nothing, and passages that are not in its text."""
    torch.manual_seed(seed)
    words = torch.randint(1, VOCABULARY, (8, 9)).tolist()
    text = torch.randint(1, VOCABULARY, (12, 16))
    rows = [{"input_ids": part} for part in text.split(4)]
    seen, unseen = halves([Passage(tuple(row[:5]), tuple(row[5:])) for row in words])
    return Setting(
        name="lm", seed=seed, facts={"sizes": (8, 9)}, model=llama().eval(), layers="mlp",
        seen=seen, unseen=unseen, text=[torch.randint(1, VOCABULARY, (3, 20))], statistics=rows,
        tokens=100, clean=rows[:2],
    )  # fmt: skip


@pytest.fixture
def setting() -> Setting:
    return tiny(5, True)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETTINGS, "lm", tiny)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder a dry run writes to."""
    out = tmp_path_factory.mktemp("frontier")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SETTINGS, "lm", tiny)
        assert dry_run(out) == 0
    return out


def dry_run(out: Path, *more: str) -> int:
    return run.main(["lm", "--dry-run", "--seed", "5", "--out", str(out), *more])


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "lm-seed5.json").read_text(encoding="utf-8"))


def test_a_dry_run_measures_every_method_at_two_strengths(folder: Path) -> None:
    found = read(folder)
    assert set(found["points"]) == {method.name for method in LM}
    for method in LM:
        points = found["points"][method.name]
        assert list(points) == [str(method.strengths[0]), str(method.strengths[-1])]
        for point in points.values():
            assert {*MEASURES, "perplexity"} <= set(point)
            assert point["cpu_seconds"] > 0
            assert ("kept_fraction" in point) != method.supervised
    assert {*MEASURES, "perplexity"} == set(found["base"])
    assert {"cpu", "torch", "commit"} <= set(found["environment"])


def test_every_supervised_rival_there_is_takes_part(folder: Path) -> None:
    points = read(folder)["points"]
    told = {next(iter(points[m.name].values())).get("method") for m in LM if m.supervised}
    assert told == {rival.__name__ for rival in RIVALS} - {
        TruncatedSVD.__name__, RandomPairs.__name__
    }  # fmt: skip


def test_every_importance_there_is_takes_part() -> None:
    names = {method.name.replace("-", "_") for method in LM if not method.supervised}
    assert names == {*get_args(Importance), "top"}


def test_a_run_goes_on_with_what_is_missing_alone(folder: Path, tmp_path: Path) -> None:
    found = read(folder)
    gone = found["points"]["durable"].pop("0.06")
    found["points"]["npo"]["5"]["perplexity"] = -1.0
    (tmp_path / "lm-seed5.json").write_text(json.dumps(found), encoding="utf-8")
    assert dry_run(tmp_path) == 0
    again = read(tmp_path)
    assert again["points"]["npo"]["5"]["perplexity"] == -1.0
    fresh = again["points"]["durable"].pop("0.06")
    assert again == found
    assert {k: v for k, v in fresh.items() if k != "cpu_seconds"} == {
        k: v for k, v in gone.items() if k != "cpu_seconds"
    }


def test_results_of_another_setting_are_not_mixed_in(folder: Path, tmp_path: Path) -> None:
    found = read(folder)
    found["setting"]["sizes"] = [8, 10]
    text = json.dumps(found)
    (tmp_path / "lm-seed5.json").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match="another setting"):
        dry_run(tmp_path)
    assert (tmp_path / "lm-seed5.json").read_text(encoding="utf-8") == text


def test_the_model_is_put_back_whatever_a_method_does(setting: Setting) -> None:
    before = {name: value.clone() for name, value in setting.model.state_dict().items()}

    @torch.no_grad()
    def change(setting: Setting, strength: float) -> dict[str, Any]:
        for parameter in setting.model.parameters():
            parameter.mul_(strength)
        if strength > 2:
            raise InterruptedError
        return {"told": strength}

    base = setting.measures()["perplexity"]
    point = run.measured(setting, Method("m", "m", change, (2, 3)), 2)
    assert point["told"] == 2
    assert point["perplexity"] != base
    with pytest.raises(InterruptedError):
        run.measured(setting, Method("m", "m", change, (2, 3)), 3)
    for name, value in setting.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_what_a_method_needs_is_part_of_its_cost_whoever_prepared_it(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.process_time", lambda: clock[0])
    fresh = dataclasses.replace(setting)

    def change(setting: Setting, strength: float) -> dict[str, Any]:
        if "basis" not in setting.spent:
            clock[0] += 5
            setting.spent["basis"] = 5
        clock[0] += 2
        return {}

    for needs, cost in (((), 2), (("basis",), 7), ((), 2)):
        method = Method("m", "m", change, (1,), needs)
        assert run.measured(fresh, method, 1)["cpu_seconds"] == cost


def test_rivals_are_told_of_the_seen_half_alone(setting: Setting) -> None:
    told = {}

    class Spy:
        def forget(self, model: Any, memorized: Any, clean: Any, layers: Any, **_: Any) -> Any:
            told.update(memorized=memorized, clean=clean)
            raise InterruptedError

    with pytest.raises(InterruptedError):
        forget_by(lambda strength: Spy())(setting, 1)
    assert told == {"memorized": setting.seen, "clean": setting.clean}


@pytest.mark.slow
def test_no_passage_of_the_demo_is_in_both_halves_or_in_the_text_that_is_to_stay() -> None:
    setting = trained(5, True)
    assert not set(setting.seen) & set(setting.unseen)
    assert len(setting.seen) + len(setting.unseen) == 8
    rows = [row for batch in setting.statistics for row in batch["input_ids"].tolist()]
    streams = [" ".join(map(str, row)) for row in rows]
    for passage in (*setting.seen, *setting.unseen):
        assert not any(" ".join(map(str, passage.suffix)) in stream for stream in streams)
    kept = [row for batch in setting.clean for row in batch["input_ids"].tolist()]
    assert kept == rows[: len(kept)]
    assert setting.measures().keys() == {*MEASURES, "perplexity"}


def test_edits_of_one_mass_keep_as_much_of_each_layer(setting: Setting) -> None:
    before = {name: value.clone() for name, value in setting.model.state_dict().items()}
    kept, found = setting.basis.keep(mass=0.9), {}
    for name in ("kfac", "svd", "random"):
        facts = edit_by(name)(setting, 0.9)
        pairs = sum(kept.pairs.values())
        weights = sum(setting.model.get_submodule(layer).weight.numel() for layer in kept)
        assert 0.05 < facts["kept_fraction"] == pairs / weights < 0.95
        found[name] = {layer: setting.model.get_submodule(layer).weight.clone() for layer in kept}
        restore(setting.model, before)
    curvfast.edit(setting.model, setting.basis, mass=0.9)
    for layer, kfac in found["kfac"].items():
        assert torch.equal(kfac, setting.model.get_submodule(layer).weight)
        assert not torch.equal(kfac, found["random"][layer])
        rank = int(torch.linalg.matrix_rank(found["svd"][layer].double(), rtol=1e-4))
        assert rank == round(kept[layer].fraction * min(kfac.shape))
        own = setting.basis[layer]
        inside = own.vectors_g.T.double() @ found["random"][layer].double() @ own.vectors_a.double()
        assert int((inside.abs() > 1e-6).sum()) == kept[layer].pairs


def test_each_half_is_measured_for_itself(setting: Setting) -> None:
    prompts = [passage.prefix for passage in setting.seen]
    recited = [
        Passage(prompt, tuple(suffix))
        for prompt, suffix in zip(prompts, greedy(setting.model, prompts, 4), strict=True)
    ]
    found = dataclasses.replace(setting, seen=recited).measures()
    assert [found[f"{m}_seen"] for m in ("strict", "loose", "levenshtein")] == [1, 1, 0]
    assert found["strict_unseen"] < 1
    assert found["levenshtein_unseen"] > 0
    swapped = dataclasses.replace(setting, seen=setting.unseen, unseen=recited).measures()
    assert swapped["strict_unseen"] == 1
    assert swapped["levenshtein_seen"] == found["levenshtein_unseen"]


def test_both_halves_are_of_all_sources() -> None:
    assert halves([1, 2, 3, 4, 5]) == ([1, 3, 5], [2, 4])


# Interpolation


def point(perplexity: float, recited: float) -> dict[str, float]:
    return {**dict.fromkeys(MEASURES, recited), "perplexity": perplexity, "cpu_seconds": recited}


@given(
    st.floats(0.51, 0.99), st.floats(0.01, 2), st.floats(0, 1), st.floats(0, 1),
    st.floats(1.1, 100),
)  # fmt: skip
def test_a_measure_that_is_linear_in_perplexity_is_found_exactly(
    share: float, rise: float, start: float, end: float, base: float
) -> None:
    # Twice the rise asked for is the furthest that a line is drawn to.
    found = at_rise(point(base, start), [point(base * (1 + rise), end)], share * rise)
    assert found.reached
    for measure in MEASURES:
        assert found.values[measure] == pytest.approx(start + share * (end - start))
    assert found.values["cpu_seconds"] == end


def test_the_first_crossing_counts_where_perplexity_falls_again() -> None:
    path = [point(104, 0.8), point(112, 0.6), point(103, 0.5), point(120, 0.0)]
    assert at_rise(point(100, 1), path, 0.08).values["strict_seen"] == pytest.approx(0.7)
    assert at_rise(point(100, 1), path, 0.119).values["strict_seen"] == pytest.approx(0.6025)
    assert at_rise(point(100, 1), path, 0.16).values["strict_seen"] == pytest.approx(
        0.5 - 0.5 * 13 / 17
    )


def test_a_method_that_never_gets_there_is_shown_at_its_strongest() -> None:
    found = at_rise(point(100, 1), [point(103, 0.4), point(102, 0.3)], 0.05)
    assert not found.reached
    assert found.rise == pytest.approx(0.02)
    assert found.values["strict_seen"] == 0.3
    there = at_rise(point(100, 1), [point(108, 0.2)], 0.05)
    assert furthest([there, there]) is None
    assert furthest([there, found]) == pytest.approx((0.05 + 0.02) / 2)
    assert over_seeds([found], "strict_seen") == (0.3, None)
    mean, spread = over_seeds([found, there], "strict_seen")
    assert mean == pytest.approx((0.3 + 0.5) / 2)
    assert spread == pytest.approx(0.2 / 2**0.5)


def test_a_method_whose_weakest_change_costs_far_more_is_shown_there() -> None:
    path = [point(200, 0.5), point(300, 0.1)]
    near = at_rise(point(100, 1), path, 0.5)
    assert near.reached
    assert near.values["strict_seen"] == pytest.approx(0.75)
    far = at_rise(point(100, 1), path, 0.49)
    assert not far.reached
    assert far.rise == 1
    assert far.values["strict_seen"] == 0.5
    # Between strengths a line is drawn however far.
    assert at_rise(point(100, 1), [point(101, 0.9), *path], 0.05).reached


# Tables


def test_tables_show_methods_measured_in_full_and_no_others() -> None:
    kfac, svd = (next(m for m in LM if m.name == name) for name in ("kfac", "svd"))
    points = {kfac.name: {str(s): point(100 + 10 * i, 0.5) for i, s in
                          enumerate(kfac.strengths)}}  # fmt: skip
    points[svd.name] = {str(svd.strengths[-1]): point(103, 0.25)}
    found = {"name": "lm", "base": point(100, 1), "points": points}
    head, base, *lines = table.recited([found])
    assert head[1:3] == ["+5%, seen", "+5%, unseen"]
    assert base == ["unedited"] + ["100"] * 6
    assert [line[0] for line in lines] == [kfac.label]
    points[svd.name] = {str(s): point(103, 0.25) for s in svd.strengths}
    *_, line = table.recited([found, found])
    assert line == [svd.label] + ["25 ± 0 (at +3%)"] * 6
    *_, line = table.detailed([found])
    assert line == [svd.label, "25 (at +3%)", "25 (at +3%)", "0.25 (at +3%)", "0.25 (at +3%)",
                    "0.25"]  # fmt: skip
    # Weak to strong, in whatever order they were measured.
    measured = [(str(s), point(101 + 4 * i, 1 - 0.12 * i)) for i, s in enumerate(svd.strengths)]
    points[svd.name] = dict(reversed(measured))
    *_, line = table.recited([found])
    assert line[1:] == ["88", "88", "73", "73", "43", "43"]


@pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS)
def test_names_and_strengths_are_told_apart(methods: tuple[Method, ...]) -> None:
    assert len({method.name for method in methods}) == len(methods)
    for method in methods:
        assert len({str(s) for s in method.strengths}) == len(method.strengths) > 1
