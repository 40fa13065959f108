"""The study of spectra, cut to seconds, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import lab_data
import numpy as np
import pytest
import torch

from curvfast.cli import main
from curvfast.experiments.studies import spectra
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.kfac.layer_basis import LayerBasis
from curvfast.kfac.spectrum import effective_rank

# Factors of models cut to seconds lack rank, which is of no matter here.
pytestmark = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab_data.install(monkeypatch, tmp_path / "cache")


def layer(d_out: int, d_in: int) -> LayerBasis:
    values_g = 4.0 * torch.arange(1, d_out + 1, dtype=torch.float64) ** -1.25
    values_a = torch.arange(1, d_in + 1, dtype=torch.float64) ** -0.75
    return LayerBasis(values_a, torch.eye(d_in), values_g, torch.eye(d_out))


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["-q", "study", "spectra", "--quick", "--seeds", "0", "--out", str(tmp_path)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    for title in ("demo's LM", "lab's LM", "lab's ViT", "effective rank of G"):
        assert title in printed
    path = tmp_path / "spectra" / "seed-0.json"
    found = json.loads(path.read_text(encoding="utf-8"))["figures"]
    assert list(found) == ["demo_lm", "lab_lm", "lab_vit"]
    for layers in found.values():
        for own in layers.values():
            pairs = list(own["pairs"].values())
            assert pairs == sorted(pairs)
            assert 0 < pairs[0] <= pairs[-1] <= own["of_pairs"] == own["G"]["d"] * own["A"]["d"]
    assert (tmp_path / "spectra" / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_a_layer_is_described_by_its_own_eigenvalues() -> None:
    own = layer(64, 96)
    found = spectra._layers(Eigenbasis({"only": own}))["only"]
    assert found["G"]["law"]["exponent"] == 1.25
    assert found["G"]["law"]["scale"] == 4.0
    assert found["A"]["law"]["exponent"] == 0.75
    assert (found["A"]["law"]["first"], found["A"]["law"]["last"]) == (3, 48)
    assert found["A"]["effective_rank"] == pytest.approx(effective_rank(own.values_a), rel=1e-3)
    assert found["A"]["ranks"][-1] == 96
    assert found["A"]["values"][-1] == pytest.approx(float(own.values_a[-1]), rel=1e-3)
    products = np.sort(np.outer(own.values_g, own.values_a).ravel())[::-1]
    sums = products.cumsum() / products.sum()
    for mass, pairs in found["pairs"].items():
        assert pairs == 1 + np.searchsorted(sums, float(mass))
    for share, mass in zip(found["fractions"], found["mass"], strict=True):
        at = round(share * len(products))
        assert mass == pytest.approx(sums[at - 1] if at else 0, rel=1e-3)


def test_tables_are_of_the_median_layer_and_every_extreme() -> None:
    runs = [
        {name: spectra._layers(Eigenbasis({"a": layer(32, 32), "b": layer(64, 32)})) for name in
         spectra.MODELS}
        for _ in range(2)
    ]  # fmt: skip
    tables = spectra._tables(runs)
    first, second = tables["factors"], tables["pairs"]
    assert len(first) == len(second) == 4
    assert {len(line) for line in first} == {10}
    assert first[1][:2] == ["demo's LM", "32 and 64"]
    assert first[1][6:8] == ["1.25 ± 0.00 (1.25 to 1.25)", "0.75 ± 0.00 (0.75 to 0.75)"]
    for law in (layer["G"] for run in runs for layer in run["lab_vit"].values()):
        law["law"] = None
    assert spectra._tables(runs)["factors"][3][6] == "—"
