"""Descriptions of a spectrum, against brute force over every eigenpair product, and their log."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from curvfast.cli import main
from curvfast.errors import (
    FormatError,
    InputError,
    NonFiniteError,
    NumericalWarning,
    StorageError,
)
from curvfast.kfac import spectrum as spectra
from curvfast.kfac.factors import Factors
from curvfast.kfac.layer_factors import LayerFactors
from curvfast.kfac.spectrum import (
    curvature_spectrum,
    effective_rank,
    factor_eigenvalues,
    flattest_share,
    layer_eigenvalues,
    mass_curve,
    participation_ratio,
)
from curvfast.kfac.spectrum_log import FILE, SpectrumRecord, append, measure, read_log
from curvfast.report.plots import spectra_over_training


def lists(elements) -> st.SearchStrategy:
    return st.lists(elements, min_size=1, max_size=12).map(
        lambda v: np.sort(np.array(v, float))[::-1]
    )


values = st.one_of(
    lists(st.floats(0, 1e3, allow_subnormal=False)),
    lists(st.integers(0, 4)),
    lists(st.integers(0, 4)).map(lambda v: v * 1e-200),
    st.integers(1, 12).map(lambda n: 1.0 / np.arange(1, n + 1) ** 4),
    st.integers(1, 12).map(lambda n: np.r_[1.0, np.zeros(n)]),
)
fractions = st.lists(st.floats(0, 1), min_size=1, max_size=5).map(sorted)


def products(g, a) -> np.ndarray:
    """Return all λᵢμⱼ over their sum, descending: the definition."""
    assume(g[0] > 0 and a[0] > 0)
    return np.sort(np.multiply.outer(g / g.sum(), a / a.sum()).ravel())[::-1]


def entropy_rank(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(np.exp(-sum(float(x) * np.log(float(x)) for x in p)))


@given(values, values, fractions)
@settings(max_examples=300, deadline=None)
def test_the_mass_curve_is_that_of_all_products_sorted(g, a, at) -> None:
    p = products(g, a)
    expected = [p[: int(f * len(p) + 0.5)].sum() for f in at]
    found = mass_curve(g, a, at)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert list(found) == sorted(found)


@given(values, values, st.floats(0, 1))
@settings(max_examples=300, deadline=None)
def test_the_flattest_share_is_that_of_the_smallest_products(g, a, fraction) -> None:
    p = products(g, a)
    kept = int((1 - fraction) * len(p) + 0.5)
    assert flattest_share(g, a, fraction) == pytest.approx(p[kept:].sum(), rel=1e-9, abs=1e-300)


@given(values, values)
@settings(max_examples=300, deadline=None)
def test_ranks_and_traces_of_the_products_are_products(g, a) -> None:
    p = products(g, a)
    found = curvature_spectrum(g, a, [0.5])
    assert found.effective_rank == pytest.approx(entropy_rank(p), rel=1e-9)
    assert found.trace == pytest.approx(g.sum() * a.sum(), rel=1e-12)
    ratio = participation_ratio(g) * participation_ratio(a)
    assert ratio == pytest.approx(1 / np.square(p).sum(), rel=1e-9)
    assert ratio <= found.effective_rank * (1 + 1e-9)
    assert found.mass[0] + found.flattest_half == pytest.approx(1, rel=1e-9)


@given(st.integers(1, 40), st.integers(1, 40), st.floats(1e-30, 1e30))
@settings(max_examples=60, deadline=None)
def test_a_flat_spectrum_has_full_rank_and_a_straight_curve(d_out, d_in, height) -> None:
    found = curvature_spectrum(np.full(d_out, height), np.ones(d_in), [0.25, 1.0])
    n = d_out * d_in
    assert found.effective_rank == pytest.approx(n)
    assert found.mass == pytest.approx((int(0.25 * n + 0.5) / n, 1.0))
    assert found.flattest_half == pytest.approx(1 - int(0.5 * n + 0.5) / n)


def test_a_single_direction_has_rank_one() -> None:
    found = curvature_spectrum([5.0, 0, 0, 0], [2.0, 0], [0.1, 1.0])
    assert (found.effective_rank, found.trace, found.flattest_half) == (1.0, 10.0, 0.0)
    # A tenth of 8 pairs is one.
    assert found.mass == (1.0, 1.0)


def test_shares_below_the_rounding_of_one_keep_their_digits() -> None:
    share = flattest_share([1.0, 1e-20], [1.0], 0.5)
    assert share == pytest.approx(1e-20, rel=1e-12, abs=0)


def test_a_layer_without_curvature_has_no_rank_and_no_mass() -> None:
    found = curvature_spectrum([0.0, 0.0], [3.0, 1.0], [0.5, 1.0])
    assert (found.trace, found.effective_rank, found.flattest_half) == (0.0, 0.0, 0.0)
    assert found.mass == (0.0, 0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mass_curve([1.0], [1.0], [1.5]), "fraction=1.5"),
        (lambda: flattest_share([1.0], [1.0], -0.5), "fraction=-0.5"),
        (lambda: effective_rank([1.0, 2.0]), "values must be .* descending"),
        (lambda: participation_ratio([1.0, -1.0]), "values must be non-negative"),
        (lambda: curvature_spectrum([], [1.0]), "values_g must be a list"),
    ],
)
def test_what_is_no_spectrum_is_refused(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize(("d", "rows"), [(1, 3), (7, 40), (60, 20)])
def test_eigenvalues_of_a_factor_are_the_squared_singular_values(d, rows, scale) -> None:
    x = torch.randn(rows, d, dtype=torch.float64)
    matrix = x.T @ x * scale
    expected = torch.zeros(d, dtype=torch.float64)
    expected[: min(d, rows)] = torch.linalg.svdvals(x).square() * scale
    found = factor_eigenvalues(matrix, title="A")
    assert (found >= 0).all()
    assert (found.diff() <= 0).all()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13 * float(expected[0]))


def test_a_shared_a_is_solved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    solved = []
    monkeypatch.setattr(
        spectra, "factor_eigenvalues",
        lambda matrix, title: solved.append(title) or torch.ones(len(matrix)),
    )  # fmt: skip
    a, g = torch.eye(3), torch.eye(2)
    known: dict[int, torch.Tensor] = {}
    for name in ("gate", "up"):
        layer_eigenvalues(name, LayerFactors(a, g.clone(), 1, 1), known)
    assert solved == ["A of layer 'gate'", "G of layer 'gate'", "G of layer 'up'"]


@pytest.mark.parametrize("failure", ["raises", "wrong"])
def test_a_solver_that_fails_is_followed_by_one_with_eigenvectors(
    failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def solver(matrix: torch.Tensor) -> torch.Tensor:
        if failure == "raises":
            raise torch.linalg.LinAlgError("no convergence")
        return torch.ones(len(matrix), dtype=torch.float64)

    monkeypatch.setattr(torch.linalg, "eigvalsh", solver)
    with pytest.warns(NumericalWarning, match="A is decomposed with eigenvectors"):
        found = factor_eigenvalues(torch.diag(torch.tensor([1.0, 3.0, 2.0])), title="A")
    assert found.tolist() == [3.0, 2.0, 1.0]


def test_a_factor_that_overflowed_is_refused_by_name() -> None:
    with pytest.raises(NonFiniteError, match="A of layer 'x'"):
        factor_eigenvalues(torch.tensor([[float("inf")]]), title="A of layer 'x'")


# --- the log --------------------------------------------------------------------------------------


def record(step: int, run: str = "one") -> SpectrumRecord:
    x = torch.randn(20, 6)
    g = torch.randn(20, 4) / (step + 1)
    layers = {
        "λ.0.mlp": LayerFactors(x.T @ x, g.T @ g, 20, 20),
        "λ.1.mlp": LayerFactors(x.T @ x, torch.diag(torch.tensor([1.0, 0, 0, 0])), 20, 20),
    }
    return measure(Factors(layers), run=run, step=step, steps=2, loss=1.5, processes=3)


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    records = [record(step) for step in (0, 5, 10)]
    for each in records:
        append(tmp_path / "log", each)
    assert read_log(tmp_path / "log") == records
    assert read_log(tmp_path / "log" / FILE) == records
    assert read_log(tmp_path) == []


@pytest.mark.parametrize("left", [0, 1, 40, -1])
def test_a_line_left_unfinished_by_a_killed_run_is_passed_over_and_replaced(
    left: int, tmp_path: Path
) -> None:
    records = [record(step) for step in (0, 5)]
    for each in records:
        append(tmp_path, each)
    path = tmp_path / FILE
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:left])
    assert read_log(tmp_path) == records[:1]
    append(tmp_path, records[1])
    assert path.read_bytes() == first + second


def test_what_a_resumed_run_measures_again_takes_the_place_of_what_was_there(
    tmp_path: Path,
) -> None:
    again = replace(record(5), loss=0.5)
    for each in (record(0), record(5), record(10), again):
        append(tmp_path, each)
    assert [(each.step, each.loss) for each in read_log(tmp_path)] == [(0, 1.5), (5, 0.5)]


def test_the_last_run_is_read_unless_another_is_named(tmp_path: Path) -> None:
    for each in (record(0), record(5), record(0, "two")):
        append(tmp_path, each)
    assert [(each.run, each.step) for each in read_log(tmp_path)] == [("two", 0)]
    assert [each.step for each in read_log(tmp_path, "one")] == [0, 5]
    assert read_log(tmp_path, "three") == []


def test_every_line_is_strict_json_whatever_the_loss(tmp_path: Path) -> None:
    factors = Factors({"x": LayerFactors(torch.zeros(2, 2), torch.zeros(1, 1), 1, 1)})
    append(tmp_path, measure(factors, run="r", step=0, loss=float("nan")))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json.loads((tmp_path / FILE).read_text(), parse_constant=refuse)
    assert (line["version"], line["loss"], line["layers"]["x"]["flattest_half"]) == (1, None, 0.0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no json", "no record"),
        ("[1]", "no record"),
        ('{"kind": "curvfast-spectrum", "version": "new"}', "no record"),
        ('{"kind": "curvfast-spectrum", "version": 2}', "up to version 1"),
        ('{"kind": "something", "version": 1}', "'something'"),
        ('{"kind": "curvfast-spectrum", "version": 1, "layers": {}}', "damaged"),
        ('{"kind": "curvfast-spectrum", "version": 1, "layers": {"x": {"rows": 1}}}', "damaged"),
    ],
)
def test_what_is_no_log_is_refused_by_its_line(line: str, message: str, tmp_path: Path) -> None:
    append(tmp_path, record(0))
    with (tmp_path / FILE).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(FormatError, match=f"line 2 .*{message}"):
        read_log(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a file")
    with pytest.raises(StorageError, match="could not append"):
        append(tmp_path / "log", record(0))


# --- what is shown of it --------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [[0], [0, 5, 10], list(range(20))])
def test_the_figure_shows_every_layer_the_median_and_curves_from_first_to_last(
    steps: list[int],
) -> None:
    records = [record(step) for step in steps]
    figure = spectra_over_training(records, title="run one")
    ranks, halves, curves = figure.axes
    first = records[0].layers["λ.0.mlp"]
    line, other, middle = ranks.lines
    assert line.get_xdata()[0] == 0
    assert line.get_ydata()[0] == pytest.approx(100 * first.effective_rank / 24)
    assert middle.get_ydata()[0] == pytest.approx((line.get_ydata()[0] + other.get_ydata()[0]) / 2)
    assert halves.lines[0].get_ydata()[0] == pytest.approx(100 * first.flattest_half)
    labels = [line.get_label() for line in curves.lines]
    assert labels[0] == f"step {steps[0]}"
    assert labels[-1] == f"step {steps[-1]}"
    assert len(labels) == len(set(labels)) == min(6, len(steps))
    both = [layer.mass[-1] for layer in records[-1].layers.values()]
    assert curves.lines[-1].get_ydata()[-1] == pytest.approx(100 * sum(both) / 2)


def test_the_command_prints_a_line_a_measurement_and_draws_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [record(0), record(5)]
    for each in records:
        append(tmp_path, each)
    assert main(["spectrum-log", str(tmp_path), "--layers", "*.0.*"]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split()[:4] == ["step", "loss", "layers", "rows"]
    for line, each in zip(lines, records, strict=True):
        layer = each.layers["λ.0.mlp"]
        assert line.split()[:5] == [
            str(each.step), "1.5000", "1", "20", f"{layer.effective_rank / 24:.2%}"
        ]  # fmt: skip
    assert (tmp_path / "spectrum.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [([], "no spectrum log"), (["--run", "two"], "of run 'two'"), (["--layers", "x"], "matches")],
)
def test_the_command_says_what_is_not_there(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if options:
        append(tmp_path, record(0))
    assert main(["spectrum-log", str(tmp_path), *options]) == 1
    assert message in capsys.readouterr().err
