"""Eigenbases: order, orthogonality, negative eigenvalues, sharing, and files."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from curvfast import Corrections, Eigenbasis, Factors, LayerFactors
from curvfast.errors import (
    DecompositionError,
    InputError,
    LayerNotFound,
    NonFiniteError,
    NumericalWarning,
    PerformanceWarning,
)
from curvfast.kfac import decomposition
from curvfast.kfac.corrections import LayerCorrection
from curvfast.kfac.decomposition import decompose_factor


def factors(d_in: int = 12, d_out: int = 7, rows: int = 400, layers: int = 1) -> Factors:
    x = torch.randn(rows, d_in) * torch.logspace(0, -2, d_in)
    a_sum = x.T @ x
    made = {}
    for number in range(layers):
        g = torch.randn(rows, d_out)
        made[f"layer{number}"] = LayerFactors(a_sum, g.T @ g, rows, rows)
    return Factors(made)


def test_whatever_is_known_by_layer_says_what_it_lacks() -> None:
    measured = factors(layers=2)
    basis = measured.eigh()
    lambdas = {name: LayerCorrection(torch.full((7, 12), 6.0), 3) for name in measured}
    corrections = Corrections(lambdas, "position")
    known = {
        "factors": measured, "eigenbasis": basis, "correction": corrections,
        "selection": basis.keep(mass=0.5),
    }  # fmt: skip
    for noun, each in known.items():
        assert (list(each), len(each)) == (["layer0", "layer1"], 2)
        assert "layer0" in each
        assert "layer2" not in each
        with pytest.raises(
            LayerNotFound, match=f"no {noun} of layer 'layer2'; there are: 'layer0', 'layer1'$"
        ):
            each["layer2"]
    assert measured["layer0"] is measured.layers["layer0"]
    assert (corrections["layer0"] == 2).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-6), (torch.float32, 2e-5)])
def test_eigenpairs_rebuild_the_factors(dtype: torch.dtype, tolerance: float) -> None:
    measured = factors()
    basis = measured.eigh(dtype=dtype)["layer0"]
    for values, vectors, matrix in (
        (basis.values_a, basis.vectors_a, measured["layer0"].A),
        (basis.values_g, basis.vectors_g, measured["layer0"].G),
    ):
        assert (values.diff() <= 0).all()
        assert values.dtype == torch.float64
        rebuilt = vectors.double() @ values.diag() @ vectors.double().T
        assert (rebuilt - matrix.double()).norm() <= tolerance * matrix.norm()
        identity = vectors.double().T @ vectors.double()
        assert (identity - torch.eye(len(values))).abs().max() <= tolerance


def test_float64_resolves_a_spectrum_that_float32_loses() -> None:
    d = 128
    vectors = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]
    spectrum = torch.logspace(0, -5.5, d, dtype=torch.float64)
    a = ((vectors * spectrum) @ vectors.T).float()
    measured = Factors({"x": LayerFactors(a, a, 1, 1)})
    errors = {}
    for dtype in (torch.float64, torch.float32):
        values = measured.eigh(dtype=dtype)["x"].values_a
        errors[dtype] = float((values / spectrum - 1).abs().max())
    assert errors[torch.float64] < 0.05
    assert errors[torch.float32] > 3 * errors[torch.float64]


def test_signs_are_deterministic() -> None:
    basis = factors().eigh()["layer0"]
    largest = basis.vectors_a.gather(0, basis.vectors_a.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


@pytest.mark.cpu_branches
def test_a_shared_factor_is_decomposed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: calls.append(len(m)) or original(m))
    basis = factors(layers=3).eigh()
    assert sorted(calls) == [7, 7, 7, 12]
    assert basis["layer0"].vectors_a is basis["layer2"].vectors_a


@pytest.mark.parametrize(
    ("size", "verdict"), [(1e-3, "far beyond rounding"), (1e-7, "rounding of")]
)
def test_negative_eigenvalues_are_clamped_and_told(size: float, verdict: str) -> None:
    bad = torch.diag(torch.tensor([1.0, 0.5, -size]))
    measured = Factors({"blocks.3": LayerFactors(bad, torch.eye(2), 1, 1)})
    with pytest.warns(NumericalWarning, match=verdict) as caught:
        values = measured.eigh()["blocks.3"].values_a
    assert f"{size:.1e}" in str(caught[0].message)
    assert "A of layer 'blocks.3'" in str(caught[0].message)
    assert values.min() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_factors_name_the_layer(value: float) -> None:
    measured = factors()
    measured["layer0"].g_sum[2, 3] = value
    with pytest.raises(NonFiniteError, match="G of layer 'layer0'"):
        measured.eigh()


def test_bad_requests_teach() -> None:
    measured = factors()
    with pytest.raises(InputError, match="float64"):
        measured.eigh(dtype=torch.bfloat16)
    basis = measured.eigh()
    with pytest.raises(InputError, match="exactly one"):
        basis.keep()
    with pytest.raises(InputError, match="exactly one"):
        basis.keep(mass=0.5, pairs=3)
    for holder in (measured, basis, basis.keep(mass=0.5)):
        with pytest.raises(LayerNotFound, match="layer0"):
            holder["layer9"]


def test_keep_selects_each_layer_by_its_own_spectrum() -> None:
    basis = factors(layers=2).eigh()
    kept = basis.keep(mass=0.8)
    assert list(kept) == ["layer0", "layer1"]
    assert all(kept[name].mass >= 0.8 for name in kept)
    assert all(basis.keep(pairs=5)[name].pairs == 5 for name in kept)
    assert all(basis.keep(fraction=0.5)[name].pairs == 42 for name in kept)


def test_files_keep_bits_and_sharing(tmp_path) -> None:
    measured = factors(layers=2)
    measured.save_pretrained(tmp_path / "factors")
    again = Factors.from_pretrained(tmp_path / "factors")
    assert again["layer0"].a_sum is again["layer1"].a_sum
    assert torch.equal(again["layer1"].g_sum, measured["layer1"].g_sum)
    assert again["layer1"].rows_g == 400
    basis = measured.eigh()
    basis.save_pretrained(tmp_path / "basis")
    loaded = Eigenbasis.from_pretrained(tmp_path / "basis")
    assert loaded["layer0"].vectors_a is loaded["layer1"].vectors_a
    for field in ("values_a", "vectors_a", "values_g", "vectors_g"):
        assert torch.equal(getattr(loaded["layer1"], field), getattr(basis["layer1"], field))


def test_factors_of_other_layers_or_widths_do_not_add() -> None:
    with pytest.raises(InputError, match="layer1"):
        factors() + factors(layers=2)
    with pytest.raises(ValueError, match="different models"):
        factors() + factors(d_in=5)


def matrices() -> dict[str, torch.Tensor]:
    """Factors that are hard on a solver, float32 as they are collected."""
    d = 40
    vectors = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]

    def of(spectrum: torch.Tensor) -> torch.Tensor:
        return ((vectors * spectrum) @ vectors.T).float()

    ones = torch.ones(d, dtype=torch.float64)
    x = torch.randn(7, d)
    return {
        "zero": torch.zeros(d, d),
        "identity": torch.eye(d),
        "rank-deficient": x.T @ x,
        "repeated": of(torch.cat([3 * ones[:20], ones[20:]])),
        "ill-conditioned": of(torch.logspace(0, -12, d, dtype=torch.float64)),
        "huge": 1e20 * of(torch.logspace(0, -3, d, dtype=torch.float64)),
        "tiny": 1e-20 * of(torch.logspace(0, -3, d, dtype=torch.float64)),
        "denormal": 1e-42 * torch.eye(d),
        "largest": torch.full((d, d), 3e38),
        "one": torch.tensor([[2.0]]),
    }


@pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", matrices())
def test_hard_factors_are_decomposed_within_the_floor(name: str, dtype: torch.dtype) -> None:
    matrix = matrices()[name]
    found = decompose_factor(matrix, dtype=dtype, title=name)
    exact = torch.linalg.eigvalsh(matrix.double()).flip(0)
    floor = {torch.float64: 4e-8, torch.float32: 2e-5}[dtype]
    assert ((found.values - exact).abs() <= floor * exact[0].abs() + 1e-44).all()
    rebuilt = found.vectors.double() @ found.values.diag() @ found.vectors.double().T
    assert (rebuilt - matrix.double()).norm() <= 2e-5 * matrix.double().norm() + 1e-42


def failing(monkeypatch: pytest.MonkeyPatch, **solvers: Any) -> None:
    for name, function in solvers.items():
        monkeypatch.setattr(decomposition, name, function)


def test_a_failed_solver_is_followed_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(matrix: torch.Tensor) -> Any:
        # A solver may spoil its input before it fails.
        matrix.fill_(float("nan"))
        raise torch.linalg.LinAlgError("failed to converge")

    matrix = torch.diag(torch.tensor([1.0, 3.0, 2.0]))
    failing(monkeypatch, _by_torch=broken)
    with pytest.warns(NumericalWarning, match="failed to converge"):
        found = decompose_factor(matrix, dtype=torch.float64, title="A of layer 'x'")
    torch.testing.assert_close(found.values, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    failing(monkeypatch, _by_numpy=broken)
    with (
        pytest.warns(NumericalWarning),
        pytest.raises(DecompositionError, match=r"(?s)A of layer 'x'.*cpu float32.*numpy float64"),
    ):
        decompose_factor(matrix, dtype=torch.float32, title="A of layer 'x'")


def test_out_of_memory_goes_to_the_cpu_with_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    original = decomposition._by_torch
    calls = []

    def full(matrix: torch.Tensor) -> Any:
        calls.append(matrix.dtype)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("tried to allocate 9 GiB")
        return original(matrix)

    failing(monkeypatch, _by_torch=full)
    with pytest.warns(PerformanceWarning, match="9 GiB"):
        found = decompose_factor(torch.eye(3), dtype=torch.float32, title="x")
    assert calls == [torch.float32, torch.float64]
    assert torch.equal(found.values, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda values, vectors: (values * 1.001, vectors), "residual"),
        (lambda values, vectors: (values, vectors[:, [0, 0, 2]]), "residual"),
        (lambda values, vectors: (values, 2 * vectors), "orthonormal"),
        (lambda values, vectors: (values * float("nan"), vectors), "residual"),
    ],
)
def test_a_wrong_result_is_noticed(
    monkeypatch: pytest.MonkeyPatch, spoil: Any, message: str
) -> None:
    original = decomposition._by_torch
    failing(monkeypatch, _by_torch=lambda m: spoil(*original(m)))
    for scale in (1.0, 2.0**120):
        # Unscaled, the norm of a huge matrix overflows, and every residual looks small beside it.
        matrix = scale * torch.diag(torch.tensor([1.0, 3.0, 2.0]))
        with pytest.warns(NumericalWarning, match=message):
            found = decompose_factor(matrix, dtype=torch.float32, title="x")
        assert (found.values / scale).tolist() == [3.0, 2.0, 1.0]


def test_a_solver_may_spoil_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    original = decomposition._by_torch

    def spoiling(matrix: torch.Tensor) -> Any:
        found = original(matrix)
        matrix.zero_()
        return found

    failing(monkeypatch, _by_torch=spoiling)
    found = decompose_factor(torch.diag(torch.tensor([1.0, 3.0])), dtype=torch.float64, title="x")
    assert found.values.tolist() == [3.0, 1.0]


def test_workers_change_nothing() -> None:
    measured = factors(layers=4)
    one, three = measured.eigh(), measured.eigh(workers=3)
    for name in one:
        assert torch.equal(one[name].vectors_g, three[name].vectors_g)
        assert torch.equal(one[name].values_a, three[name].values_a)
    with pytest.raises(InputError, match="workers=0"):
        measured.eigh(workers=0)


def test_a_streamed_basis_is_the_same_and_reads_what_it_is_asked_for(tmp_path: Any) -> None:
    measured = factors(layers=3)
    basis, streamed = measured.eigh(), measured.eigh(directory=tmp_path / "basis")
    assert list(streamed) == list(basis)
    for name in basis:
        for field in ("values_a", "vectors_a", "values_g", "vectors_g"):
            assert torch.equal(getattr(streamed[name], field), getattr(basis[name], field))
    # The shared A is stored once: three G and one A.
    assert len(list((tmp_path / "basis").glob("*.safetensors"))) == 4
    again = Eigenbasis.from_pretrained(tmp_path / "basis")
    assert torch.equal(again["layer1"].vectors_g, basis["layer1"].vectors_g)
    streamed.save_pretrained(tmp_path / "copy")
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) == 4


@pytest.mark.cpu_branches
def test_an_interrupted_stream_leaves_the_old_state(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = factors(layers=2)
    measured.eigh(directory=tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    original = decomposition._by_torch
    calls = []

    def interrupted(matrix: torch.Tensor) -> Any:
        calls.append(matrix)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(matrix)

    failing(monkeypatch, _by_torch=interrupted)
    # Written again, the same factors give files of the same names: those must stay as well.
    for again in (factors(layers=2), measured):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            again.eigh(directory=tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert list(Eigenbasis.from_pretrained(tmp_path)) == ["layer0", "layer1"]
