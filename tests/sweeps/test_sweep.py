"""Sweeps: each point is an edit, nothing of it stays, and what was measured is not lost."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

import curvfast
from curvfast import Eigenbasis, Factors, LayerFactors, Sweep
from curvfast.errors import FormatError, InputError, LayerNotFound
from curvfast.kfac import importance as importances
from curvfast.kfac.importance import Importance
from curvfast.sweeps import trials
from curvfast.sweeps.trials import Hold

SHAPES = [(9, 6), (7, 9), (6, 7)]
ALL = get_args(Importance)
# They share one kind of vectors: eigenvectors of curvature, rows and columns, or singular vectors.
FRAMES = [[n for n in ALL if n not in ("identity", "identity_saliency", "svd")],
          ["identity", "identity_saliency"], ["svd"]]  # fmt: skip


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(d_in, d_out) for d_out, d_in in SHAPES))


@pytest.fixture(scope="module")
def basis() -> Eigenbasis:
    generator = torch.Generator().manual_seed(1)

    def moment(d: int) -> Tensor:
        x = torch.randn(40, d, generator=generator) * torch.logspace(0, -1, d)
        return x.T @ x

    return Factors(
        {str(i): LayerFactors(moment(a), moment(g), 40, 40) for i, (g, a) in enumerate(SHAPES)}
    ).eigh()


def corrections(basis: Eigenbasis) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {name: torch.rand(own.shape, generator=generator) for name, own in basis.items()}


class Watch:
    """An evaluation that remembers the weights it was shown, and fails when told to."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.seen: list[list[Tensor]] = []
        self.fails_at = fails_at

    def __call__(self, model: nn.Module) -> dict[str, float]:
        self.seen.append([p.detach().clone() for p in model.parameters()])
        if len(self.seen) == self.fails_at:
            raise KeyboardInterrupt
        return {"norm": float(sum(p.detach().norm() for p in model.parameters()))}


def stored(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("hold", get_args(Hold))
@pytest.mark.parametrize("importance", ALL)
def test_a_point_is_the_edit_of_its_size(
    model: nn.Module, basis: Eigenbasis, importance: Any, hold: Any
) -> None:
    given = corrections(basis) if importance.startswith("ekfac") else None
    watch, before = Watch(), stored(model)
    found = curvfast.sweep(
        model, basis, [0.9, 0.5], importance, evaluate=watch, fraction=0.3, corrections=given,
        hold=hold,
    )  # fmt: skip
    assert same(stored(model), before)
    assert same(watch.seen[0], before)
    sizes: list[dict[str, float]] = [{"mass": 0.9}, {"mass": 0.5}, {"fraction": 0.3}]
    for size, point, seen in zip(sizes, found.points, watch.seen[1:], strict=True):
        with curvfast.edited(
            model, basis, importance=importance, corrections=given, **size
        ) as report:
            for one, two in zip(seen, model.parameters(), strict=True):
                torch.testing.assert_close(one, two, rtol=0, atol=2e-6)
        if importance != "svd":
            assert point.kept_fraction == report.kept_fraction
        elif "fraction" in size:
            # Of 6, 7 and 6 singular directions 2 each.
            assert point.kept_fraction == 6 / 19
        assert (point.mass, point.fraction) == (size.get("mass"), size.get("fraction"))
        assert (point.importance, point.layers, point.names) == (importance, "all", tuple(basis))
        assert point.metrics == {"norm": pytest.approx(sum(float(p.norm()) for p in seen))}
        assert not same(seen, before)
    assert found.unedited.kept_fraction == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_precision_come_back_bit_for_bit(
    model: nn.Module, basis: Eigenbasis, dtype: torch.dtype
) -> None:
    model.to(dtype)
    before = stored(model)
    watch = Watch()
    curvfast.sweep(model, basis, [0.5, 0.9], ["kfac", "svd"], evaluate=watch)
    assert same(stored(model), before)
    assert all(p.dtype == dtype for p in model.parameters())
    assert len({float(seen[0].double().norm()) for seen in watch.seen}) == 5


def test_an_evaluation_that_fails_leaves_the_model_as_it_was(
    model: nn.Module, basis: Eigenbasis
) -> None:
    before = stored(model)
    for fails_at in (1, 2, 4):
        watch = Watch(fails_at)
        with pytest.raises(KeyboardInterrupt):
            curvfast.sweep(model, basis, [0.5, 0.7, 0.9], evaluate=watch)
        assert same(watch.seen[-1], before) == (fails_at == 1)
        assert same(stored(model), before)


def test_each_weight_is_rotated_once(
    model: nn.Module, basis: Eigenbasis, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(title: str, original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: (calls.append(title), original(*given))[1]

    for module in (trials, importances):
        monkeypatch.setattr(module, "rotate", counted("rotate", module.rotate))
    for module, name in ((trials, "singular_vectors"), (importances, "singular_values")):
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    sets = ["0", ["0", "1"], None]
    # Of every kind of vectors, out of order.
    several: list[Any] = ["kfac_saliency", "identity", "svd", "kfac", "random"]
    found = curvfast.sweep(model, basis, [0.5, 0.9], several, sets, evaluate=Watch())
    assert sorted(calls) == ["rotate"] * 6 + ["singular_vectors"] * 3
    assert len(found.points) == 2 * 5 * 3
    calls.clear()
    curvfast.sweep(model, basis, [0.5, 0.9], ["identity"], evaluate=Watch())
    assert calls == []
    curvfast.sweep(model, basis, [0.5, 0.9], ["kfac"], evaluate=Watch(), hold="anew")
    assert calls == ["rotate"] * 6


def test_points_of_one_kind_of_vectors_follow_each_other(
    model: nn.Module, basis: Eigenbasis
) -> None:
    several: list[Any] = ["svd", "kfac_saliency", "identity", "kfac"]
    found = curvfast.sweep(model, basis, 0.5, several, evaluate=Watch())
    assert [p.importance for p in found.points] == ["svd", "kfac_saliency", "kfac", "identity"]


def test_only_the_layers_of_a_set_are_edited(model: nn.Module, basis: Eigenbasis) -> None:
    watch, before = Watch(), stored(model)
    sets = {"first": "0", "outer": ["0", "2"], "every": None}
    found = curvfast.sweep(model, basis, 0.5, ["kfac", "identity"], sets, evaluate=watch)
    touched = {"first": {"0"}, "outer": {"0", "2"}, "every": {"0", "1", "2"}}
    for point, seen in zip(found.points, watch.seen[1:], strict=True):
        changed = {str(i // 2) for i in range(6) if not torch.equal(seen[i], before[i])}
        assert changed == touched[point.layers] == set(point.names)
        kept = sum(int(basis[n].shape[0] * basis[n].shape[1]) for n in point.names)
        assert point.kept_fraction * kept == pytest.approx(round(point.kept_fraction * kept))
    assert [p.layers for p in found.points] == ["first", "outer", "every"] * 2
    # A glob is its own name; several globs are one set only inside a list of their own.
    found = curvfast.sweep(model, basis, 0.5, layers=["[01]", ["0", "2"]], evaluate=watch)
    assert [(p.layers, p.names) for p in found.points] == [
        ("[01]", ("0", "1")), ("0, 2", ("0", "2"))
    ]  # fmt: skip


def test_nothing_is_drawn_from_the_global_generator(model: nn.Module, basis: Eigenbasis) -> None:
    state = torch.get_rng_state()
    one, two, other = (
        curvfast.sweep(model, basis, 0.5, "random", evaluate=Watch(), seed=seed)
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert one.points[0].metrics == two.points[0].metrics != other.points[0].metrics


class TestResults:
    def test_several_evaluations_are_joined(self, model: nn.Module, basis: Eigenbasis) -> None:
        found = curvfast.sweep(
            model, basis, 0.5,
            evaluate=[lambda m: {"a": 1}, lambda m: {"b": torch.tensor(2.5), "c": math.inf}],
        )  # fmt: skip
        for point in (found.unedited, *found.points):
            assert list(point.metrics) == ["a", "b", "c"]
            assert (point.metrics["a"], point.metrics["b"]) == (1.0, 2.5)
            assert math.isnan(point.metrics["c"])
            assert all(type(value) is float for value in point.metrics.values())

    @pytest.mark.parametrize(
        ("evaluate", "match"),
        [
            (lambda m: 3.0, "returned float, not numbers by name"),
            (lambda m: {"a": "high"}, "'high' for 'a', not a number"),
            (lambda m: {"a": torch.ones(2)}, "not a number"),
            (lambda m: {"kept_fraction": 1.0}, "'kept_fraction', which there is already"),
            ([lambda m: {"a": 1.0}, lambda m: {"a": 2.0}], "'a', which there is already"),
            ([], "must be a function"),
            ([3], "must be a function"),
        ],
    )
    def test_what_is_no_measure_is_refused(
        self, model: nn.Module, basis: Eigenbasis, evaluate: Any, match: str
    ) -> None:
        before = stored(model)
        with pytest.raises(InputError, match=match):
            curvfast.sweep(model, basis, 0.5, evaluate=evaluate)
        assert same(stored(model), before)

    def test_curves_are_compared_at_one_value(self, model: nn.Module, basis: Eigenbasis) -> None:
        found = curvfast.sweep(
            model, basis, [0.3, 0.6, 0.9], ["kfac", "identity"], evaluate=Watch()
        )
        target = sum(p.metrics["norm"] for p in found.points[1:3]) / 2
        table = found.matched("norm", target)
        assert [r.importance for r in table.rows] == ["kfac", "identity"]
        # Norms fall with every pair removed, so between the same two points.
        sizes = sorted(p.kept_fraction for p in found.points[1:3])
        assert sizes[0] < table.rows[0].kept_fraction < sizes[1]
        assert table.rows[0].metrics == {"norm": pytest.approx(target)}
        assert all(r.refusal for r in found.matched("norm", 1e9).rows)
        with pytest.raises(InputError, match="'perplexity'"):
            found.matched("perplexity", 20)

    def test_a_sweep_prints_as_a_table(self, model: nn.Module, basis: Eigenbasis) -> None:
        found = curvfast.sweep(model, basis, 0.5, "kfac", evaluate=Watch(), fraction=0.25)
        lines = [line.split() for line in str(found).splitlines()]
        assert lines[0] == ["importance", "layers", "rule", "kept_fraction", "norm", "seconds"]
        assert [line[0] for line in lines[1:]] == ["unedited", "kfac", "kfac"]
        assert lines[2][2:4] == ["mass", "0.5"]
        assert lines[3][2:4] == ["fraction", "0.25"]
        assert len({len(line) for line in str(found).splitlines()}) == 1


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, InputError, "pass mass= or fraction="),
    ({"mass": []}, InputError, "mass= is empty"),
    ({"mass": [0.5, 1.5]}, InputError, r"mass=1\.5"),
    ({"fraction": [0.5, -1]}, InputError, r"fraction=-1"),
    ({"mass": 0.5, "importance": "best"}, InputError, "importance='best'"),
    ({"mass": 0.5, "importance": []}, InputError, "importance= is empty"),
    ({"mass": 0.5, "importance": ["kfac", "ekfac"]}, InputError, "needs corrections="),
    ({"mass": 0.5, "corrections": {}}, InputError, "no importance= takes them"),
    (
        {"mass": 0.5, "importance": "ekfac", "corrections": {"0": torch.ones(9, 6)}},
        LayerNotFound,
        "nothing for '1', '2'",
    ),
    ({"mass": 0.5, "layers": ["0", "nowhere"]}, LayerNotFound, "nowhere"),
    ({"mass": 0.5, "layers": []}, InputError, "layers= is empty"),
    ({"mass": 0.5, "layers": ["0", ["0"]]}, InputError, "'0' twice"),
    ({"mass": 0.5, "layers": {"a": "0", "b": ["0"]}}, InputError, "means the same"),
    ({"mass": 0.5, "hold": "disk"}, InputError, "hold='disk'"),
]


@pytest.mark.parametrize(("options", "error", "match"), BAD)
def test_bad_input_is_refused_before_anything_is_measured(
    model: nn.Module, basis: Eigenbasis, tmp_path: Path, options: Any, error: Any, match: str
) -> None:
    watch = Watch()
    with pytest.raises(error, match=match):
        curvfast.sweep(model, basis, evaluate=watch, out=tmp_path / "x.jsonl", **options)
    assert watch.seen == []
    assert list(tmp_path.iterdir()) == []


class TestFiles:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "new" / "sweep.jsonl"

    def test_a_stopped_sweep_goes_on_where_it_was(
        self, model: nn.Module, basis: Eigenbasis, path: Path
    ) -> None:
        masses = [0.3, 0.6, 0.9]
        whole = curvfast.sweep(model, basis, masses, evaluate=Watch())
        with pytest.raises(KeyboardInterrupt):
            curvfast.sweep(model, basis, masses, evaluate=Watch(3), out=path)
        assert len(path.read_bytes().splitlines()) == 3
        half = Sweep.from_jsonl(path)
        assert [p.mass for p in half.points] == [0.3]
        again = Watch()
        found = curvfast.sweep(model, basis, masses, evaluate=again, out=path)
        assert len(again.seen) == 2
        assert [p.metrics for p in found.points] == [p.metrics for p in whole.points]
        assert Sweep.from_jsonl(path) == found
        # Every line is JSON, and nothing was written twice.
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line.get("mass") for line in lines] == [None, None, *masses]

    def test_a_half_written_line_is_dropped(
        self, model: nn.Module, basis: Eigenbasis, path: Path
    ) -> None:
        first = curvfast.sweep(model, basis, [0.3, 0.6], evaluate=Watch(), out=path)
        written = path.read_bytes()
        last = len(written.splitlines(keepends=True)[-1])
        for missing in (1, last // 2, last - 1):
            path.write_bytes(written[:-missing])
            assert Sweep.from_jsonl(path).points == first.points[:1]
            again = Watch()
            found = curvfast.sweep(model, basis, [0.3, 0.6], evaluate=again, out=path)
            assert len(again.seen) == 1
            assert [p.metrics for p in found.points] == [p.metrics for p in first.points]
            assert Sweep.from_jsonl(path) == found
        # Of the very first line too.
        path.write_bytes(written[:20])
        again = Watch()
        curvfast.sweep(model, basis, [0.3, 0.6], evaluate=again, out=path)
        assert len(again.seen) == 3
        assert len(Sweep.from_jsonl(path).points) == 2

    def test_sizes_and_importances_may_grow_and_sets_be_called_otherwise(
        self, model: nn.Module, basis: Eigenbasis, path: Path
    ) -> None:
        curvfast.sweep(model, basis, 0.3, evaluate=Watch(), out=path)
        again = Watch()
        found = curvfast.sweep(
            model, basis, [0.6, 0.3], ["identity", "kfac"], {"mine": None}, evaluate=again,
            out=path, fraction=0.3,
        )  # fmt: skip
        assert len(again.seen) == 5
        assert {p.layers for p in found.points} == {"mine"}
        keys = [(p.importance, p.mass, p.fraction) for p in found.points]
        assert keys == [(i, *s) for i in ("identity", "kfac")
                        for s in ((0.6, None), (0.3, None), (None, 0.3))]  # fmt: skip

    def test_a_file_of_another_sweep_is_refused_and_left_alone(
        self, model: nn.Module, basis: Eigenbasis, path: Path
    ) -> None:
        curvfast.sweep(model, basis, 0.3, evaluate=Watch(), out=path)
        written = path.read_bytes()
        nudged = copy.deepcopy(model)
        with torch.no_grad():
            nudged[1].weight[3, 4] += 1e-6
        wider = nn.Sequential(*model, nn.Linear(6, 2))
        scaled = Eigenbasis(
            {n: curvfast.LayerBasis(o.values_a * 1.01, o.vectors_a, o.values_g, o.vectors_g)
             for n, o in basis.items()}
        )  # fmt: skip
        factors = Factors(
            {n: LayerFactors(torch.eye(o.shape[1]), torch.eye(o.shape[0]), 1, 1)
             for n, o in basis.items()}
        )  # fmt: skip
        for changed, own, options, match in (
            (nudged, basis, {}, "weights differ"),
            (wider, basis, {}, "model differ"),
            (model, scaled, {}, "basis differ"),
            (model, basis.with_task(factors), {}, "tasks, basis differ"),
            (model, basis, {"seed": 1}, "seed differ"),
            (model, basis, {"layers": "0"}, "weights, basis differ"),
            (
                model,
                basis,
                {"importance": "ekfac", "corrections": corrections(basis)},
                "corrections, basis differ",
            ),
        ):
            watch = Watch()
            with pytest.raises(InputError, match=match):
                curvfast.sweep(changed, own, 0.3, evaluate=watch, out=path, **options)
            assert watch.seen == []
            assert path.read_bytes() == written

    def test_metrics_must_stay_the_same(
        self, model: nn.Module, basis: Eigenbasis, path: Path
    ) -> None:
        curvfast.sweep(model, basis, 0.3, evaluate=Watch(), out=path)
        written = path.read_bytes()
        with pytest.raises(InputError, match=r"returned \['loss'\], and before \['norm'\]"):
            curvfast.sweep(model, basis, 0.6, evaluate=lambda m: {"loss": 1.0}, out=path)
        assert path.read_bytes() == written

    def test_what_is_not_finite_is_null_and_comes_back_as_nan(
        self, model: nn.Module, basis: Eigenbasis, path: Path
    ) -> None:
        curvfast.sweep(model, basis, 0.3, evaluate=lambda m: {"a": math.nan}, out=path)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["metrics"] for line in lines[1:]] == [{"a": None}] * 2
        found = Sweep.from_jsonl(path)
        assert math.isnan(found.points[0].metrics["a"])

    def test_what_is_no_file_of_a_sweep_is_refused(
        self, model: nn.Module, basis: Eigenbasis, path: Path
    ) -> None:
        with pytest.raises(FormatError, match="missing or empty"):
            Sweep.from_jsonl(path)
        path.parent.mkdir()
        newer = '{"kind": "curvfast-sweep", "version": 99}\n'
        headless = '{"kind": "curvfast-sweep", "version": 1, "of": {}}\n'
        for content in (
            "hello\n", "[]\n", '{"kind": "curvfast-spectrum", "version": 1}\n', newer, headless,
            newer.replace("99", '"new"'),
        ):  # fmt: skip
            path.write_text(content)
            with pytest.raises(FormatError):
                Sweep.from_jsonl(path)
            with pytest.raises(FormatError):
                curvfast.sweep(model, basis, 0.3, evaluate=Watch(), out=path)
            assert path.read_text() == content
        path.unlink()
        curvfast.sweep(model, basis, 0.3, evaluate=Watch(), out=path)
        lines = path.read_text().splitlines()
        path.write_text("\n".join([lines[0], '{"importance": 1}', lines[2], ""]))
        with pytest.raises(FormatError, match="line 2"):
            Sweep.from_jsonl(path)
        path.write_text(lines[0] + "\n")
        with pytest.raises(FormatError, match="no point yet"):
            Sweep.from_jsonl(path)


GAINS = {"0": 1.0, "1": 3.0, "2": -0.5}
COSTS = {"0": 1.0, "1": 10.0, "2": 1.0}


class TestLayerSearch:
    @pytest.fixture
    def evaluate(self, model: nn.Module) -> Callable[[nn.Module], dict[str, float]]:
        """Figures that depend on which weights are edited, and on nothing else."""
        before = stored(model)

        def figures(model: nn.Module) -> dict[str, float]:
            now = stored(model)
            changed = [n for i, n in enumerate("012") if not torch.equal(now[2 * i], before[2 * i])]
            return {
                "memorized": 10 - sum(GAINS[n] for n in changed),
                "ppl": 20 + sum(COSTS[n] for n in changed),
                "score": sum(GAINS[n] for n in changed),
            }

        return figures

    def test_the_best_candidate_is_added_while_it_helps(
        self, model: nn.Module, basis: Eigenbasis, evaluate: Any
    ) -> None:
        before = stored(model)
        for objective in ("memorized", "-score"):
            found = curvfast.search_layers(
                model, basis, 0.5, evaluate=evaluate, objective=objective, labels="made up"
            )
            assert found.chosen == ("1", "0")
            # In the order of the basis, as the edit takes them.
            assert found.names == ("0", "1")
            assert [p.metrics["memorized"] for p in found.steps] == [7.0, 6.0]
            assert [p.names for p in found.tried] == [
                ("0",), ("1",), ("2",), ("0", "1"), ("1", "2"), ("0", "1", "2")
            ]  # fmt: skip
            assert same(stored(model), before)

    def test_bounds_and_numbers_of_candidates_are_kept(
        self, model: nn.Module, basis: Eigenbasis, evaluate: Any
    ) -> None:
        def search(**options: Any) -> Any:
            given = {"objective": "memorized", "labels": "made up", **options}
            return curvfast.search_layers(model, basis, 0.5, evaluate=evaluate, **given).chosen

        assert search(at_most={"ppl": 25}) == ("0",)
        assert search(at_most={"ppl": 19}) == ()
        # What the unedited model does not keep is a demand on the edit.
        assert search(at_most={"memorized": 9.5}, objective="ppl") == ("0",)
        assert search(most=1) == ("1",)
        assert search(most=0) == ()
        assert search(candidates=["2"]) == ()
        assert search(candidates={"ends": ["0", "2"], "middle": "1"}) == ("middle", "ends")
        assert search(candidates={"later": "1", "worse": ["1", "2"]}) == ("later",)

    def test_what_the_search_knew_is_said(
        self, model: nn.Module, basis: Eigenbasis, evaluate: Any
    ) -> None:
        found = curvfast.search_layers(
            model, basis, 0.5, evaluate=evaluate, objective="memorized",
            labels="200 passages known to be memorized",
        )  # fmt: skip
        text = str(found).splitlines()
        assert text[0] == (
            "layers chosen by 'memorized', knowing: 200 passages known to be memorized"
        )
        assert [line.split()[:3] for line in text[1:4]] == [
            ["unedited", "memorized", "10"], ["+", "1", "memorized"], ["+", "0", "memorized"]
        ]  # fmt: skip
        assert "flatter" in text[-1]
        for labels in ("", "  "):
            with pytest.raises(InputError, match="labels= is empty"):
                curvfast.search_layers(
                    model, basis, 0.5, evaluate=evaluate, objective="ppl", labels=labels
                )
        for options in ({"objective": "loss"}, {"objective": "ppl", "at_most": {"loss": 1}}):
            with pytest.raises(InputError, match="no 'loss', but 'memorized', 'ppl', 'score'"):
                curvfast.search_layers(model, basis, 0.5, evaluate=evaluate, labels="x", **options)

    def test_a_search_goes_on_where_it_was_and_knows_its_labels(
        self, model: nn.Module, basis: Eigenbasis, evaluate: Any, tmp_path: Path
    ) -> None:
        calls: list[int] = []

        def counted(model: nn.Module) -> dict[str, float]:
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return evaluate(model)

        def search(labels: str = "made up") -> Any:
            return curvfast.search_layers(
                model, basis, 0.5, evaluate=counted, objective="memorized", labels=labels,
                out=tmp_path / "search.jsonl",
            )  # fmt: skip

        with pytest.raises(KeyboardInterrupt):
            search()
        assert search().chosen == ("1", "0")
        assert len(calls) == 8
        assert search().chosen == ("1", "0")
        assert len(calls) == 8
        with pytest.raises(InputError, match="note differ"):
            search("others")

    def test_an_objective_that_is_no_number_is_never_chosen(
        self, model: nn.Module, basis: Eigenbasis
    ) -> None:
        for measured, chosen in (([math.nan] * 3, ()), ([math.nan, 0.5, 0.9, 0.8, 0.8], ("1",))):
            figures = iter([1.0, *measured])
            found = curvfast.search_layers(
                model, basis, 0.5, evaluate=lambda m, rest=figures: {"a": next(rest)},
                objective="a", labels="x",
            )  # fmt: skip
            assert found.chosen == chosen
