"""An edit as a LoRA adapter: the best of its rank, in PEFT's format, its error told."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import pytest
import torch
from cases import basis_of, gpt2, llama, token_batches
from families import mixture
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import curvfast
from curvfast.errors import InputError, StorageError
from curvfast.export.lora import truncated
from curvfast.model.layers import linear_layers

pytestmark = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")


@pytest.fixture(scope="module", params=[llama, gpt2], ids=["llama", "gpt2"])
def measured(request: pytest.FixtureRequest) -> tuple[nn.Module, curvfast.Eigenbasis]:
    torch.manual_seed(0)
    model = request.param()
    return model, basis_of(model)


def change(model: nn.Module, basis: Any, **options: Any) -> dict[str, torch.Tensor]:
    """ΔW of each layer, in float64, from the edit itself."""
    edited = copy.deepcopy(model)
    curvfast.edit(edited, basis, **options)
    before, after = linear_layers(model), linear_layers(edited)
    return {n: (after[n].matrix() - before[n].matrix()).double() for n in basis}


def product(folder: Any, name: str) -> torch.Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    down, up = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    config = json.loads((folder / "adapter_config.json").read_text())
    rank = config["rank_pattern"].get(name, config["r"])
    alpha = config["alpha_pattern"].get(name, config["lora_alpha"])
    assert down.shape[0] == up.shape[1] == rank
    return (alpha / rank) * (up.double() @ down.double())


@pytest.mark.parametrize("options", [{"mass": 0.5}, {"mass": 0.8, "strength": -0.5}])
def test_the_adapter_is_the_nearest_of_its_rank_and_says_how_near(
    measured, options, tmp_path
) -> None:
    """Eckart and Young: no matrix of rank r is nearer; the rest are the smaller singular values."""
    model, basis = measured
    before = copy.deepcopy(model.state_dict())
    report = curvfast.export_lora(model, basis, tmp_path, rank=5, **options)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    wanted = change(model, basis, **options)
    assert [layer.name for layer in report.layers] == list(basis)
    lost = whole = 0.0
    for layer in report.layers:
        delta = wanted[layer.name]
        found = product(tmp_path, layer.name)
        assert layer.rank == 5
        error = float((found - delta).norm())
        assert error == pytest.approx(float(torch.linalg.svdvals(delta)[5:].norm()), rel=1e-5)
        assert layer.relative_error == pytest.approx(error / float(delta.norm()), rel=1e-4)
        assert layer.energy == pytest.approx(1 - layer.relative_error**2, rel=1e-9)
        weight = linear_layers(model)[layer.name].matrix()
        assert layer.change == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-4)
        lost, whole = lost + error**2, whole + float(delta.norm()) ** 2
    assert report.energy == pytest.approx(1 - lost / whole, rel=1e-4)
    assert 0 < report.energy < 1
    assert len(str(report).splitlines()) == 2 + len(basis)


def test_full_rank_is_the_whole_edit_and_no_more(measured, tmp_path) -> None:
    """A layer narrower than the rank has its own width: said by the patterns, layer by layer."""
    model, basis = measured
    report = curvfast.export_lora(model, basis, tmp_path, rank=30, mass=0.5)
    for name, delta in change(model, basis, mass=0.5).items():
        assert (product(tmp_path, name) - delta).norm() <= 1e-5 * delta.norm()
    assert {layer.rank for layer in report.layers} == {24}
    assert report.energy == 1
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == dict.fromkeys(basis, 24)


def test_no_change_is_an_adapter_of_zeros(measured, tmp_path) -> None:
    model, basis = measured
    report = curvfast.export_lora(model, basis, tmp_path, rank=3, strength=0)
    assert report.energy == 1
    assert all((e.relative_error, e.energy, e.change) == (0, 1, 0) for e in report.layers)
    assert all(not product(tmp_path, name).any() for name in basis)


def test_no_change_of_half_precision_is_an_adapter_of_zeros_too(measured, tmp_path) -> None:
    model, basis = measured
    half = copy.deepcopy(model).bfloat16()
    report = curvfast.export_lora(half, basis, tmp_path, rank=3, strength=0)
    assert report.energy == 1
    assert all(not product(tmp_path, name).any() for name in basis)


def test_the_format_is_pefts(measured, tmp_path) -> None:
    model, basis = measured
    model.config._name_or_path = "house/model"
    name = list(basis)[1]
    report = curvfast.export_lora(model, basis, tmp_path, rank=4, mass=0.5, layers=name)
    files = {"adapter_config.json", "adapter_model.safetensors", "curvfast.json"}
    assert {path.name for path in tmp_path.iterdir()} == files
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    wanted = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "house/model",
        "r": 4, "lora_alpha": 4, "target_modules": [name], "bias": "none", "lora_dropout": 0.0,
        "fan_in_fan_out": type(model).__name__ == "GPT2LMHeadModel", "rank_pattern": {},
        "alpha_pattern": {}, "inference_mode": True, "use_rslora": False,
    }  # fmt: skip
    assert {key: config[key] for key in wanted} == wanted
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    keys = {f"base_model.model.{name}.lora_{side}.weight" for side in "AB"}
    assert tensors.keys() == keys
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    facts = json.loads((tmp_path / "curvfast.json").read_text())
    assert facts["format_version"] == 1
    assert facts["energy"] == report.energy
    assert facts["provenance"]["rule"] == {"mass": 0.5}


def test_both_factors_have_one_norm() -> None:
    """So that neither overflows or vanishes in half precision."""
    delta = 1e-3 * torch.randn(40, 24)
    down, up, values = truncated(delta, 6)
    assert down.norm() == pytest.approx(float(up.norm()), rel=1e-5)
    assert float(values.square().sum()) == pytest.approx(float(delta.square().sum()), rel=1e-5)


def test_what_cannot_be_written_is_refused_before_anything_is(measured, tmp_path) -> None:
    model, basis = measured
    out = tmp_path / "out"
    with pytest.raises(InputError, match="rank of the adapter"):
        curvfast.export_lora(model, basis, out, rank=0)
    with pytest.raises(InputError, match="only one"):
        curvfast.export_lora(model, basis, out, rank=1, mass=0.5, pairs=3)
    experts = mixture("Mixtral")
    with pytest.raises(InputError, match=r"experts\.0.*leave it out"):
        curvfast.export_lora(experts, basis_of(experts), out, rank=1)
    assert not out.exists()
    out.write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="could not write"):
        curvfast.export_lora(model, basis, out, rank=1)


@pytest.mark.parametrize("rank", [4, 30])
def test_peft_reads_it_and_computes_the_weight_plus_the_cut_change(
    measured, rank, tmp_path
) -> None:
    peft = pytest.importorskip("peft")
    model, basis = copy.deepcopy(measured[0]).eval(), measured[1]
    curvfast.export_lora(model, basis, tmp_path, rank=rank, mass=0.5)
    with warnings.catch_warnings():
        # A weight without its adapter is only warned of.
        warnings.filterwarnings("error", message=".*(missing|adapter).*")
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    batch = token_batches()[0]
    unedited = model(**batch).logits
    for name, layer in linear_layers(model).items():
        if name in basis:
            layer.write(layer.matrix() + product(tmp_path, name))
    exact = model(**batch).logits
    assert (exact - unedited).abs().max() > 1e-3
    assert (wrapped(**batch).logits - exact).abs().max() <= 1e-6
    merged = wrapped.merge_and_unload()
    assert (merged(**batch).logits - exact).abs().max() <= 1e-6
