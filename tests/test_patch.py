"""A patch: exact there and back, in every dtype, on its own weights alone."""

from __future__ import annotations

import copy
import hashlib
import json
import tracemalloc
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cases import basis_of, gpt2, llama
from families import mixture
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

import curvfast
from curvfast.cli import main
from curvfast.core.mask import Mask
from curvfast.errors import (
    CurvfastError,
    InputError,
    LayerNotFound,
    PatchMismatch,
    StorageError,
)
from curvfast.writing import difference
from curvfast.writing.checkpoint import patch_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def made(model: torch.nn.Module, **options: Any) -> curvfast.Patch:
    return curvfast.make_patch(model, basis_of(model), **{"mass": 0.6, **options})


@pytest.fixture(scope="module", params=[llama, gpt2], ids=["llama", "gpt2"])
def measured(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, curvfast.Eigenbasis]:
    torch.manual_seed(0)
    model = request.param()
    return model, basis_of(model)


@pytest.fixture(scope="module")
def original() -> tuple[torch.nn.Module, curvfast.Eigenbasis]:
    torch.manual_seed(1)
    model = llama()
    return model, basis_of(model)


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        n: t.detach().clone().view(INTEGERS[t.element_size()]) for n, t in model.named_parameters()
    }


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@given(st.sampled_from([np.uint16, np.uint32, np.uint64]), st.integers(0, 70), st.data())
@settings(max_examples=200, deadline=None)
def test_any_bits_lead_to_any_others_and_back(dtype: Any, n: int, data: Any) -> None:
    """NaN with payloads, infinities and both zeros are bits like all others."""
    before, after = (data.draw(stn.arrays(dtype, n)) for _ in range(2))
    change = difference.difference(before, after)
    planes = difference.pack(change)
    found = difference.unpack(planes, n)
    assert change.dtype == found.dtype == dtype
    assert np.array_equal(found, change)
    assert np.array_equal(difference.forward(before, found), after)
    assert np.array_equal(difference.backward(after, found), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_difference_counts_the_floats_between(dtype: torch.dtype) -> None:
    """One float up is 2, one down is 1: also across zero, and where the exponent changes."""
    values = torch.tensor([1.0, -1.0, 2.0, 0.0, 3.5], dtype=dtype)
    up = torch.nextafter(values, torch.tensor(float("inf"), dtype=dtype))
    down = torch.nextafter(values, torch.tensor(float("-inf"), dtype=dtype))
    here, above, below = map(difference.bits_of, (values, up, down))
    assert difference.difference(here, above).tolist() == [2] * 5
    # Below zero come first the other zero, then the smallest negative.
    assert difference.difference(here, below).tolist() == [1, 1, 1, 3, 1]
    assert torch.equal(difference.with_bits(values, above), up)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_changes_take_little(dtype: torch.dtype) -> None:
    weight = 0.02 * torch.randn(300, 400, dtype=torch.float64)
    sizes = []
    for change in (0.0, 1e-4, 1e-2, 0.3):
        near = (weight + change * 0.02 * torch.randn_like(weight)).to(dtype)
        pair = difference.bits_of(weight.to(dtype)), difference.bits_of(near)
        planes = difference.pack(difference.difference(*pair))
        sizes.append(sum(map(len, planes)) / near.nbytes)
    assert sizes[0] < 0.01
    assert sizes == sorted(sizes)
    # As the module's documentation tells them.
    told = {torch.bfloat16: (0.29, 0.62), torch.float16: (0.50, 0.78), torch.float32: (0.65, 0.81)}
    if dtype in told:
        assert sizes[2:] == pytest.approx(told[dtype], abs=0.02)


def test_damaged_planes_are_noticed() -> None:
    planes = difference.pack(np.arange(1000, dtype=np.uint16))
    short = zlib.compress(b"x")
    for wrong in ([planes[0], planes[1][:-3]], [planes[0][:-1], planes[1]], [planes[0], short]):
        with pytest.raises(StorageError, match="damaged"):
            difference.unpack(wrong, 1000)


def test_no_more_is_inflated_than_there_should_be() -> None:
    """A patch may come from anywhere: a few bytes must not fill the memory."""
    planes = [zlib.compress(bytes(1 << 26)), bytes(1000)]
    tracemalloc.start()
    with pytest.raises(StorageError, match="damaged"):
        difference.unpack(planes, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_patch_tells_factors_and_selections_apart(original, tmp_path) -> None:
    model, basis = original

    def told(patch: curvfast.Patch) -> tuple[list[str], list[str]]:
        layers = patch.layers.values()
        return [layer.factors for layer in layers], [layer.kept for layer in layers]

    patch = curvfast.make_patch(model, basis, mass=0.6)
    basis.save_pretrained(tmp_path)
    stored = curvfast.Eigenbasis.from_pretrained(tmp_path, lazy=True)
    kept = {name: Mask.pack(step.dense()) for name, step in basis.keep(mass=0.6).items()}
    again = curvfast.make_patch(model, stored, mass=0.6)
    assert told(again) == told(patch)
    other = curvfast.make_patch(model, basis, mass=0.5)
    assert told(other)[0] == told(patch)[0]
    assert not set(told(other)[1]) & set(told(patch)[1])
    assert not set(told(curvfast.make_patch(model, basis, selection=kept))[1]) & set(told(patch)[1])
    longer = {n: replace(b, values_a=2 * b.values_a) for n, b in basis.items()}
    found = told(curvfast.make_patch(model, curvfast.Eigenbasis(longer), mass=0.6))
    assert not set(found[0]) & set(told(patch)[0])
    assert found[1] == told(patch)[1]


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_applied_it_is_the_edit_and_reverted_nothing(measured, dtype, strength, tmp_path) -> None:
    model, basis = measured
    model = copy.deepcopy(model).to(dtype)
    # What arithmetic would not bring back.
    layer = curvfast.layers.linear_layers(model)[next(iter(basis))]
    layer.parameter.data.view(-1)[:2] = torch.tensor([-0.0, torch.finfo(dtype).tiny / 2])
    before, twin = bits(model), copy.deepcopy(model)
    options = {"mass": 0.6, "strength": strength}
    patch = curvfast.make_patch(model, basis, **options)
    assert equal(bits(model), before)
    report = curvfast.edit(twin, basis, **options)
    patch.save(tmp_path / "patch")
    stored = curvfast.Patch.load(tmp_path / "patch")
    assert stored.layers == patch.layers
    assert stored.report == patch.report
    for one in (patch, stored):
        one.apply(model)
        assert equal(bits(model), bits(twin))
        one.revert(model)
        assert equal(bits(model), before)
    entries = [dict(vars(e), seconds=0) for e in report.layers]
    assert [dict(vars(e), seconds=0) for e in patch.report.layers] == entries
    assert patch.report.provenance == report.provenance


def test_experts_of_a_mixture_are_patched_each(tmp_path) -> None:
    model = mixture("Mixtral")
    basis = basis_of(model)
    patch = curvfast.make_patch(model, basis, mass=0.6)
    assert any(layer.expert == 3 for layer in patch.layers.values())
    before, twin = bits(model), copy.deepcopy(model)
    curvfast.edit(twin, basis, mass=0.6)
    patch.apply(model)
    assert equal(bits(model), bits(twin))
    patch.revert(model)
    assert equal(bits(model), before)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(PatchMismatch, match=r"stored in another form.*patch\.apply\(model\)"):
        patch_checkpoint(patch, tmp_path / "model")


def test_edits_that_change_nothing_apply_and_revert(original) -> None:
    model, basis = copy.deepcopy(original[0]), original[1]
    layers = curvfast.layers.linear_layers(model)
    layers[next(iter(basis))].parameter.data[0, 0] = -0.0
    before = bits(model)
    patch = curvfast.make_patch(model, basis, strength=0)
    assert all(layer.before == layer.after for layer in patch.layers.values())
    patch.apply(model)
    patch.revert(model)
    assert equal(bits(model), before)
    assert patch.nbytes < 0.1 * sum(
        basis[n].values_a.nbytes * len(basis[n].values_g) for n in basis
    )


def test_a_mask_whose_mass_is_not_known_is_kept_as_such(original, tmp_path) -> None:
    model, basis = original
    kept = curvfast.select(model, basis, "random", mass=0.6)
    curvfast.make_patch(model, basis, selection=kept).save(tmp_path)
    stored = curvfast.Patch.load(tmp_path)
    assert all(layer.mass != layer.mass for layer in stored.report.layers)
    assert len(str(stored.report).splitlines()) == 1 + len(basis)
    assert "NaN" not in (tmp_path / "config.json").read_text()


class TestWhatIsRefused:
    """Nothing is written before everything has been checked."""

    def refused(self, model: Any, call: Any, match: str, error: type = PatchMismatch) -> None:
        before = bits(model)
        with pytest.raises(error, match=match):
            call(model)
        assert equal(bits(model), before)

    def test_twice(self, original) -> None:
        model, basis = copy.deepcopy(original[0]), original[1]
        patch = curvfast.make_patch(model, basis, mass=0.6)
        patch.apply(model)
        self.refused(model, patch.apply, "applied already: revert")

    def test_reverting_what_was_not_applied(self, original) -> None:
        model, basis = copy.deepcopy(original[0]), original[1]
        self.refused(model, curvfast.make_patch(model, basis).revert, "not applied")

    @pytest.mark.parametrize("applied", [False, True])
    def test_one_layer_of_another_model(self, original, applied) -> None:
        model, basis = copy.deepcopy(original[0]), original[1]
        patch = curvfast.make_patch(model, basis, mass=0.6)
        if applied:
            patch.apply(model)
        last = list(patch.layers)[-1]
        curvfast.layers.linear_layers(model)[last].parameter.data[1, 2] += 1
        self.refused(model, patch.apply, f"'{last}' holds other weights")
        self.refused(model, patch.revert, f"'{last}' holds other weights.*make_patch")

    def test_some_layers_patched_and_some_not(self, original) -> None:
        model, basis = copy.deepcopy(original[0]), original[1]
        patch = curvfast.make_patch(model, basis, mass=0.6)
        first = next(iter(patch.layers))
        curvfast.edit(model, basis, mass=0.6, layers=first)
        self.refused(model, patch.apply, "some of the layers are patched and some are not")
        self.refused(model, patch.revert, "some of the layers are patched and some are not")

    def test_another_dtype(self, original) -> None:
        model, basis = original
        patch = curvfast.make_patch(model, basis)
        other = copy.deepcopy(model).to(torch.bfloat16)
        self.refused(other, patch.apply, r"dtype=torch\.float32")

    def test_a_model_without_the_layers_or_with_others(self, original) -> None:
        model, basis = original
        patch = curvfast.make_patch(model, basis)
        self.refused(llama(num_hidden_layers=2), patch.apply, "layers.2.mlp.*lacks")
        self.refused(llama(intermediate_size=44), patch.apply, r"\[40, 24\].*\[44, 24\]")

    def test_weights_that_are_shared_here_and_were_not_there(self, original) -> None:
        model, basis = copy.deepcopy(original[0]), original[1]
        one, other = (model.model.layers[i].mlp.up_proj for i in (0, 1))
        other.weight.data.copy_(one.weight.data)
        patch = curvfast.make_patch(model, basis)
        other.weight = one.weight
        self.refused(model, patch.apply, "shares its weight", LayerNotFound)
        self.refused(model, patch.revert, "shares its weight", LayerNotFound)

    def test_a_quantised_weight(self, original) -> None:
        model, basis = copy.deepcopy(original[0]), original[1]
        patch = curvfast.make_patch(model, basis)
        name = list(patch.layers)[-1]
        model.get_submodule(name).weight.data = torch.zeros(24, 40, dtype=torch.float8_e4m3fn)
        with pytest.raises(InputError, match="quantised"):
            patch.apply(model)

    def test_bad_requests_to_make_one(self, original) -> None:
        model, basis = original
        with pytest.raises(CurvfastError, match="only one"):
            curvfast.make_patch(model, basis, mass=0.5, pairs=3)
        with pytest.raises(TypeError, match="mas"):
            curvfast.make_patch(model, basis, mas=0.5)


def digests(folder) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(params=["one file", "shards"])
def checkpoint(request, tmp_path, original):
    model, basis = original
    folder = tmp_path / "model"
    size = "5GB" if request.param == "one file" else "20KB"
    model.to(torch.float32).save_pretrained(folder, max_shard_size=size)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (request.param == "shards")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocabulary.json").write_text("{}")
    curvfast.make_patch(model, basis, mass=0.6).save(tmp_path / "patch")
    return folder


class TestCheckpoints:
    def load(self, folder) -> torch.nn.Module:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder)

    def test_a_patched_folder_loads_as_the_edited_model(self, checkpoint, original) -> None:
        model, basis = copy.deepcopy(original[0]), original[1]
        before, out = digests(checkpoint), checkpoint.parent / "deep" / "out"
        base = checkpoint.parent
        assert (
            main(["apply", str(base / "patch"), "--model", str(checkpoint), "--out", str(out)]) == 0
        )
        assert digests(checkpoint) == before
        curvfast.edit(model, basis, mass=0.6)
        assert equal(bits(self.load(out)), bits(model))
        assert digests(out).keys() == before.keys()
        changed = {name for name, digest in digests(out).items() if digest != before[name]}
        assert changed
        assert all(name.endswith(".safetensors") for name in changed)
        assert main(["revert", str(base / "patch"), "--model", str(out)]) == 0
        assert digests(out) == before
        left = {path.name for path in base.iterdir()} | {path.name for path in out.parent.iterdir()}
        assert left == {"model", "patch", "deep", "out"}

    def test_in_place_and_back_every_file_is_what_it_was(self, checkpoint, capsys) -> None:
        before = digests(checkpoint)
        arguments = [str(checkpoint.parent / "patch"), "--model", str(checkpoint)]
        assert main(["apply", *arguments]) == 0
        assert "patched 9 layers" in capsys.readouterr().err
        assert main(["apply", *arguments]) == 1
        assert "applied already" in capsys.readouterr().err
        assert main(["-q", "revert", *arguments]) == 0
        assert digests(checkpoint) == before
        assert main(["revert", *arguments]) == 1
        assert capsys.readouterr().err.startswith("curvfast: the patch is not applied")

    @pytest.mark.parametrize("where", ["old", "new"])
    def test_a_full_disk_loses_nothing(self, checkpoint, monkeypatch, where) -> None:
        from curvfast.storage import TensorPlace

        before, patch = digests(checkpoint), curvfast.Patch.load(checkpoint.parent / "patch")
        done = []

        def full(self: Any, folder: Any, content: bytes) -> None:
            done.append(folder)
            if len(done) == 5:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(TensorPlace, "overwrite", full)
        out = None if where == "old" else checkpoint.parent / "out"
        with pytest.raises(StorageError, match="free space"):
            patch_checkpoint(patch, checkpoint, out)
        assert digests(checkpoint) == before
        assert {path.name for path in checkpoint.parent.iterdir()} == {"model", "patch"}

    def test_a_rename_that_fails_brings_the_old_folder_back(self, checkpoint, monkeypatch) -> None:
        from pathlib import Path

        before, patch = digests(checkpoint), curvfast.Patch.load(checkpoint.parent / "patch")
        rename = Path.rename

        def fail(self: Path, target: Any) -> Path:
            if self.name.startswith(".partial-"):
                raise OSError(16, "Device or resource busy")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", fail)
        with pytest.raises(StorageError, match="busy"):
            patch_checkpoint(patch, checkpoint)
        assert digests(checkpoint) == before
        assert {path.name for path in checkpoint.parent.iterdir()} == {"model", "patch"}

    def test_names_of_a_base_models_checkpoint_are_found(self, tmp_path) -> None:
        """Such as those of gpt2, which lack the first part, ``transformer``."""
        from transformers import AutoModelForCausalLM

        model = gpt2()
        patch = made(model)
        model.transformer.save_pretrained(tmp_path / "base")
        patch_checkpoint(patch, tmp_path / "base", tmp_path / "out")
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        patch.apply(model)
        assert equal(bits(found), bits(model))

    def test_stacked_experts_that_are_stored_so_are_found_by_their_slice(self, tmp_path) -> None:
        model = mixture("GptOss")
        patch = made(model)
        model.save_pretrained(tmp_path / "model")
        patch_checkpoint(patch, tmp_path / "model")
        from transformers import AutoModelForCausalLM

        patch.apply(model)
        assert equal(bits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), bits(model))

    def test_what_is_no_checkpoint_or_another_is_refused(self, checkpoint, tmp_path) -> None:
        patch, before = curvfast.Patch.load(checkpoint.parent / "patch"), digests(checkpoint)
        with pytest.raises(StorageError, match="holds neither"):
            patch_checkpoint(patch, tmp_path)
        for out in (tmp_path / "patch", checkpoint / "within"):
            with pytest.raises(StorageError, match="pass a new folder"):
                patch_checkpoint(patch, checkpoint, out)
        torch.manual_seed(5)
        llama().save_pretrained(tmp_path / "other")
        with pytest.raises(PatchMismatch, match="other weights"):
            patch_checkpoint(patch, tmp_path / "other")
        gpt2().save_pretrained(tmp_path / "gpt2")
        with pytest.raises(PatchMismatch, match="no tensor"):
            patch_checkpoint(patch, tmp_path / "gpt2")
        largest = max(checkpoint.glob("*.safetensors"), key=lambda path: path.stat().st_size)
        whole = largest.read_bytes()
        for content in (whole[:-1], whole[:100], b"\xff" * 50, b""):
            largest.write_bytes(content)
            with pytest.raises(StorageError, match="cannot be read"):
                patch_checkpoint(patch, checkpoint)
        largest.write_bytes(whole)
        assert digests(checkpoint) == before


def test_a_patch_folder_is_versioned_and_checked(original, tmp_path) -> None:
    model, basis = original
    curvfast.make_patch(model, basis, mass=0.7, strength=0.5).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["kind"] == "curvfast-patch"
    assert config["format_version"] == 1
    assert config["edit"]["strength"] == 0.5
    assert config["edit"]["provenance"]["rule"] == {"mass": 0.7}
    assert config["edit"]["provenance"]["factors"] == json.loads(json.dumps(basis.provenance))
    entry = config["layers"]["model.layers.0.mlp.up_proj"]
    weight = model.model.layers[0].mlp.up_proj.weight.detach().numpy().tobytes()
    assert entry["before"]["sha256"] == hashlib.sha256(weight).hexdigest()
    file = next(tmp_path.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(StorageError, match="damaged"):
        curvfast.Patch.load(tmp_path)
