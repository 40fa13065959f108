"""Eigenbases: order, orthogonality, negative eigenvalues, sharing, and files."""

from __future__ import annotations

import pytest
import torch

from curvfast import Eigenbasis, Factors, LayerFactors
from curvfast.errors import InputError, LayerNotFound, NonFiniteError, NumericalWarning


def factors(d_in: int = 12, d_out: int = 7, rows: int = 400, layers: int = 1) -> Factors:
    x = torch.randn(rows, d_in) * torch.logspace(0, -2, d_in)
    a_sum = x.T @ x
    made = {}
    for number in range(layers):
        g = torch.randn(rows, d_out)
        made[f"layer{number}"] = LayerFactors(a_sum, g.T @ g, rows, rows)
    return Factors(made)


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
