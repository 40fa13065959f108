"""Factored layers: the edited weight itself, in the fewest numbers two factors can have."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from cases import basis_of, gpt2, llama, token_batches
from families import mixture
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import curvfast
from curvfast.core.eigenbasis import LayerBasis
from curvfast.core.mask import Mask, random_mask
from curvfast.core.projection import drop_, rotate, rotate_back
from curvfast.core.staircase import Staircase
from curvfast.errors import InputError, LayerNotFound, StorageError
from curvfast.layers import linear_layers
from curvfast.writing.factored import FactoredLinear, factored_layers
from curvfast.writing.low_rank import cover, low_rank_factors

pytestmark = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")


@pytest.fixture(scope="module", params=[llama, gpt2], ids=["llama", "gpt2"])
def original(request: pytest.FixtureRequest) -> tuple[nn.Module, curvfast.Eigenbasis]:
    torch.manual_seed(0)
    model = request.param().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model, basis_of(model)


@pytest.fixture
def measured(original) -> tuple[nn.Module, curvfast.Eigenbasis]:
    return copy.deepcopy(original[0]), original[1]


def staircase(widths: list[int], columns: int) -> Staircase:
    return Staircase(torch.tensor(widths, dtype=torch.int32), columns, 0.0, 0.5)


def orthonormal(d_out: int, d_in: int) -> LayerBasis:
    left, right = (torch.linalg.qr(torch.randn(d, d).double())[0] for d in (d_out, d_in))
    return LayerBasis(torch.ones(d_in), right, torch.ones(d_out), left)


def matching(kept: torch.Tensor) -> int:
    """The most kept pairs of which no two share a row or column, by augmenting paths."""
    owner: dict[int, int] = {}

    def placed(row: int, seen: set[int]) -> bool:
        for column in kept[row].nonzero()[:, 0].tolist():
            if column not in seen:
                seen.add(column)
                if column not in owner or placed(owner[column], seen):
                    owner[column] = row
                    return True
        return False

    return sum(placed(row, set()) for row in range(len(kept)))


stairs = st.tuples(
    st.lists(st.integers(0, 12), min_size=1, max_size=12).map(lambda w: sorted(w, reverse=True)),
    st.integers(0, 4),
).map(lambda pair: staircase(pair[0], pair[0][0] + pair[1] or 1))


@given(stairs)
@settings(max_examples=300, deadline=None)
def test_a_staircase_is_covered_by_as_few_rows_and_columns_as_there_can_be(kept: Staircase) -> None:
    """König: no cover is smaller than the largest matching."""
    rows, columns = cover(kept)
    left = kept.dense().clone()
    left[rows] = False
    left[:, columns] = False
    assert not left.any()
    assert len(rows) + len(columns) == matching(kept.dense())


@given(stairs)
@settings(max_examples=300, deadline=None)
def test_no_other_form_has_fewer_numbers(kept: Staircase) -> None:
    """Neither of the bounding rectangle, in three factors or two, nor of any two rectangles."""
    d_out, d_in = kept.shape
    widths = kept.widths.tolist()
    r_g, r_a = sum(w > 0 for w in widths), widths[0]
    found = sum(map(len, cover(kept))) * (d_out + d_in)
    assert found <= d_out * r_g + r_g * r_a + r_a * d_in
    assert found <= min(r_g, r_a) * (d_out + d_in)
    for cut in range(r_g):
        top, bottom = min(cut, r_a), min(r_g - cut, widths[cut])
        assert found <= (top + bottom) * (d_out + d_in)


@given(stairs)
@settings(max_examples=60, deadline=None)
def test_the_factors_are_the_edited_weight(kept: Staircase) -> None:
    """In float64, to its rounding; and for a weight like any other no rank is smaller."""
    torch.manual_seed(0)
    d_out, d_in = kept.shape
    basis, weight = orthonormal(d_out, d_in), torch.randn(d_out, d_in).double()
    left, right = low_rank_factors(weight, basis, kept)
    exact = rotate_back(drop_(rotate(weight, basis), kept), basis)
    assert left.shape[1] == right.shape[0] == sum(map(len, cover(kept)))
    assert (left @ right - exact).norm() <= 1e-12 * weight.norm()
    assert torch.linalg.matrix_rank(exact, rtol=1e-9) == left.shape[1]


@pytest.mark.parametrize("thin", [0, 1])
def test_other_masks_are_covered_by_what_they_use(thin: int) -> None:
    kept = random_mask(9, 7, 50, torch.Generator().manual_seed(1)).dense()
    kept[[0, 2, 3, 5, 8]] = False
    if thin:
        kept[:, [1, 2, 3, 4, 6]] = False
    basis, weight = orthonormal(9, 7), torch.randn(9, 7).double()
    left, right = low_rank_factors(weight, basis, Mask.pack(kept))
    exact = rotate_back(drop_(rotate(weight, basis), Mask.pack(kept)), basis)
    assert (left @ right - exact).norm() <= 1e-12 * weight.norm()
    assert (
        left.shape[1] == min(int(kept.any(1).sum()), int(kept.any(0).sum())) == (2 if thin else 4)
    )


def test_leading_eigenvectors_suffice_where_the_edit_needs_no_more() -> None:
    whole, weight = orthonormal(9, 7), torch.randn(9, 7).double()
    kept = staircase([4, 2, 1, 0, 0, 0, 0, 0, 0], 7)
    part = LayerBasis(
        whole.values_a, whole.vectors_a[:, :5], whole.values_g, whole.vectors_g[:, :4]
    )
    found, exact = (torch.matmul(*low_rank_factors(weight, b, kept)) for b in (part, whole))
    assert (found - exact).norm() <= 1e-12 * weight.norm()


def test_the_model_computes_what_the_edited_one_does(measured) -> None:
    """In float32 it is no further from the exact edit than dense float32 weights are."""
    model, basis = measured
    batch = token_batches()[0]
    unedited, twin, exact = model(**batch).logits, copy.deepcopy(model), copy.deepcopy(model)
    exact.double()
    for name, layer in linear_layers(exact).items():
        if name in basis:
            kept = basis.keep(mass=0.4)[name]
            layer.write(rotate_back(drop_(rotate(layer.matrix(), basis[name]), kept), basis[name]))
    biases = {n: p.clone() for n, p in model.named_parameters() if n.endswith("bias")}
    state = torch.get_rng_state()
    report = curvfast.factorize(model, basis, mass=0.4)
    assert torch.equal(torch.get_rng_state(), state)
    assert {e.form for e in report.layers} == {"low rank"}
    edit = curvfast.edit(twin, basis, mass=0.4)
    wanted = exact(**batch).logits
    ours, theirs = ((m(**batch).logits.double() - wanted).norm() for m in (model, twin))
    assert ours <= 3 * theirs + 1e-12
    assert (unedited - wanted).norm() > 1e3 * ours
    for entry, dense in zip(report.layers, edit.layers, strict=True):
        assert (entry.name, entry.pairs, entry.mass) == (dense.name, dense.pairs, dense.mass)
        assert entry.relative_change == pytest.approx(dense.relative_change, rel=1e-4)
    found = {n.replace(".left.", "."): p for n, p in model.named_parameters() if n.endswith("bias")}
    assert found.keys() == biases.keys()
    assert all(torch.equal(found[n], biases[n]) for n in biases)
    assert not any(module.training for module in model.modules())


def test_the_report_counts_parameters_and_operations_as_they_are(measured) -> None:
    model, basis = measured
    before = sum(p.numel() for p in model.parameters())
    batch = {"input_ids": token_batches()[0]["input_ids"]}
    tokens = batch["input_ids"].numel()
    with FlopCounterMode(display=False) as dense:
        model(**batch)
    report = curvfast.factorize(model, basis, mass=0.4)
    with FlopCounterMode(display=False) as factored:
        model(**batch)
    saved = report.parameters_before - report.parameters_after
    assert saved > 0
    assert before - sum(p.numel() for p in model.parameters()) == saved
    assert report.flops_before - report.flops_after == 2 * saved
    assert dense.get_total_flops() - factored.get_total_flops() == 2 * saved * tokens
    layers = factored_layers(model)
    for entry in report.layers:
        layer = layers[entry.name]
        assert entry.rank == layer.rank == layer.left.in_features
        weights = layer.left.weight.numel() + layer.right.weight.numel()
        assert entry.parameters_after == weights < entry.parameters_before
        assert entry.parameters_before == layer.in_features * layer.out_features
    assert report.provenance["rule"] == {"mass": 0.4}
    assert json.loads(json.dumps(report.to_dict()))["parameters_after"] == report.parameters_after
    assert len(str(report).splitlines()) == 2 + len(basis)


def test_a_layer_of_high_rank_is_edited_in_place(measured) -> None:
    model, basis = measured
    twin, dense = copy.deepcopy(model), list(basis)[1]
    kept = {n: basis.keep(fraction=0.9 if n == dense else 0.1)[n] for n in basis}
    report = curvfast.factorize(model, basis, selection=kept)
    curvfast.edit(twin, basis, selection=kept)
    assert {e.name for e in report.layers if e.form == "dense"} == {dense}
    entry = next(e for e in report.layers if e.name == dense)
    assert entry.parameters_after == entry.parameters_before
    assert factored_layers(model).keys() == basis.keys() - {dense}
    old, new = (linear_layers(m)[dense] for m in (twin, model))
    assert torch.equal(old.matrix(), new.matrix())


def test_masks_of_any_form_and_nothing_at_all_can_be_kept(measured) -> None:
    model, basis = measured
    batch = token_batches()[0]
    kept = dict(curvfast.select(model, basis, "random", mass=0.3).items())
    first, second = list(basis)[:2]
    kept[first] = Mask.pack(basis.keep(mass=0.3)[first].dense())
    kept[second] = basis.keep(pairs=0)[second]
    twin = copy.deepcopy(model)
    report = curvfast.factorize(model, basis, selection=kept)
    curvfast.edit(twin, basis, selection=kept)
    torch.testing.assert_close(model(**batch).logits, twin(**batch).logits, rtol=0, atol=1e-5)
    assert [e.rank for e in report.layers][1] == 0
    assert report.to_dict()["layers"][-1]["mass"] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept(measured, dtype: torch.dtype) -> None:
    model, basis = measured
    model.to(dtype)
    twin = copy.deepcopy(model)
    curvfast.factorize(model, basis, mass=0.4)
    curvfast.edit(twin, basis, mass=0.4)
    assert {p.dtype for p in model.parameters()} == {dtype}
    for name, layer in factored_layers(model).items():
        x = torch.randn(5, layer.in_features, dtype=dtype)
        found, wanted = layer(x), twin.get_submodule(name)(x)
        assert found.dtype == dtype
        # The basis is orthonormal to float32: an edit that subtracts what is removed sees that.
        tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-6}[dtype]
        assert (found - wanted).norm() <= tolerance * wanted.norm()


def test_it_is_a_module_like_any_other(measured) -> None:
    """Autocast, deepcopy, state_dict, generate, gradients; weight and bias can be looked at."""
    model, basis = measured
    frozen = next(iter(basis))
    linear_layers(model)[frozen].parameter.requires_grad_(False)
    twin, empty = copy.deepcopy(model), copy.deepcopy(model)
    curvfast.factorize(model, basis, mass=0.4)
    curvfast.edit(twin, basis, mass=0.4)
    batch = token_batches()[0]
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = model(**batch).logits, twin(**batch).logits
    assert found.dtype == wanted.dtype
    assert (found - wanted).norm() <= 2e-2 * wanted.norm()
    curvfast.factorize(empty, basis, mass=0.4)
    for parameter in empty.parameters():
        parameter.data.zero_()
    empty.load_state_dict(model.state_dict())
    copied = copy.deepcopy(model)
    for other in (empty, copied):
        assert torch.equal(other(**batch).logits, model(**batch).logits)
    prompt = {"input_ids": batch["input_ids"][:1], "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**prompt), twin.generate(**prompt))
    model(**batch).loss.backward()
    for name, layer in factored_layers(model).items():
        assert (layer.left.weight.grad is None) == (name == frozen)
        assert (layer.right.weight.grad is None) == (name == frozen)
        torch.testing.assert_close(
            layer.weight, linear_layers(twin)[name].matrix(), rtol=0, atol=1e-6
        )
        assert layer.bias is layer.left.bias
        assert isinstance(layer, FactoredLinear)


class TestWhatIsRefused:
    """Before the first layer is replaced."""

    def refused(
        self, model: Any, basis: Any, match: str, error: type = InputError, **rule: Any
    ) -> None:
        modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
        with pytest.raises(error, match=match):
            curvfast.factorize(model, basis, **{"mass": 0.4, **rule})
        assert dict(model.named_modules()) == modules
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())

    def test_bad_rules(self, measured) -> None:
        self.refused(*measured, "only one", pairs=3)
        self.refused(*measured, "low rank", strength=0.5)

    def test_hooks(self, measured) -> None:
        model, basis = measured
        last = list(basis)[-1]
        module = model.get_submodule(last)
        for register in ("register_forward_hook", "register_forward_pre_hook"):
            handle = getattr(module, register)(lambda *_: None)
            self.refused(model, basis, f"'{last}' has hooks")
            handle.remove()
        for register in ("register_full_backward_hook", "register_full_backward_pre_hook"):
            handle = getattr(module, register)(lambda *_: None)
            self.refused(model, basis, f"'{last}' has hooks")
            handle.remove()
        module.forward = module.forward
        self.refused(model, basis, f"'{last}' has hooks")

    def test_experts_subclasses_and_shared_weights(self, measured) -> None:
        experts = mixture("Mixtral")
        self.refused(experts, basis_of(experts), "leave it out of layers=")
        model = llama()
        basis = basis_of(model)

        class Own(nn.Linear):
            pass

        model.model.layers[2].mlp.up_proj.__class__ = Own
        self.refused(model, basis, "is of Own")
        model.model.layers[2].mlp.up_proj.__class__ = nn.Linear
        model.model.layers[2].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
        self.refused(model, basis, "shares its weight", LayerNotFound)

    def test_a_model_that_is_the_layer(self) -> None:
        layer = nn.Linear(7, 9)
        basis = curvfast.Eigenbasis({"": orthonormal(9, 7)})
        self.refused(layer, basis, "itself the layer")

    def test_a_module_in_two_places_is_replaced_in_both(self) -> None:
        shared = nn.Linear(7, 9)
        model = nn.ModuleDict({"one": shared, "two": shared})
        basis = curvfast.Eigenbasis({"one": orthonormal(9, 7)})
        curvfast.factorize(model, basis, selection={"one": staircase([1] + [0] * 8, 7)})
        assert isinstance(model["two"], FactoredLinear)
        assert model["one"] is model["two"]
        assert factored_layers(model).keys() == {"one", "two"}


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        first[k].dtype == second[k].dtype and torch.equal(first[k], second[k]) for k in first
    )


class TestFolders:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_what_was_written_is_read(self, measured, dtype, tmp_path) -> None:
        model, basis = measured
        # One left dense, and one parameter of another dtype.
        model.to(dtype)
        next(m for n, m in model.named_modules() if n.endswith(("norm", "ln_f"))).float()
        kept = {n: basis.keep(fraction=0.9 if i == 1 else 0.1)[n] for i, n in enumerate(basis)}
        report = curvfast.factorize(model, basis, selection=kept)
        model.generation_config.max_new_tokens = 7
        curvfast.save_factored(model, tmp_path, report=report)
        state = torch.get_rng_state()
        found = curvfast.load_factored(tmp_path)
        assert torch.equal(torch.get_rng_state(), state)
        assert same(found, model)
        assert type(found) is type(model)
        assert not found.training
        assert factored_layers(found).keys() == factored_layers(model).keys()
        ours, theirs = (sum(p.numel() for p in m.parameters()) for m in (found, model))
        assert ours == theirs
        if dtype == torch.float32:
            batch = token_batches()[0]
            assert torch.equal(found(**batch).logits, model(**batch).logits)
            prompt = {"input_ids": batch["input_ids"][:1], "do_sample": False}
            assert torch.equal(found.generate(**prompt), model.generate(**prompt))
        assert found.generation_config.max_new_tokens == 7
        stored = json.loads((tmp_path / "curvfast.json").read_text())
        assert stored["format_version"] == 1
        assert stored["report"] == json.loads(json.dumps(report.to_dict()))
        # What is read can be written.
        curvfast.save_factored(found, tmp_path)
        assert same(curvfast.load_factored(tmp_path), model)

    def test_tied_weights_are_written_once_and_stay_tied(self, tmp_path) -> None:
        model = llama(tie_word_embeddings=True)
        basis = basis_of(model)
        curvfast.factorize(model, basis, mass=0.4)
        curvfast.save_factored(model, tmp_path)
        found = curvfast.load_factored(tmp_path)
        assert found.lm_head.weight is found.model.embed_tokens.weight
        assert same(found, model)
        size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
        assert size < 4 * sum(p.numel() for p in model.parameters()) + 8000

    def test_parts_are_of_a_bounded_size(self, measured, tmp_path, monkeypatch) -> None:
        model, basis = measured
        curvfast.factorize(model, basis, mass=0.4)
        monkeypatch.setattr("curvfast.hf.factored._PART_BYTES", 10_000)
        curvfast.save_factored(model, tmp_path)
        files = list(tmp_path.glob("*.safetensors"))
        assert len(files) > 2
        assert all(sum(t.nbytes for t in load_file(f).values()) <= 10_000 for f in files)
        assert same(curvfast.load_factored(tmp_path), model)

    def test_from_pretrained_refuses_the_folder(self, measured, tmp_path) -> None:
        """It would make up weights where it finds factors."""
        model, basis = measured
        curvfast.factorize(model, basis, mass=0.4)
        curvfast.save_factored(model, tmp_path)
        with pytest.raises(OSError, match="no file named"):
            type(model).from_pretrained(tmp_path)

    def test_what_cannot_be_written(self, measured, tmp_path) -> None:
        model, basis = measured
        with pytest.raises(InputError, match="no factored layer"):
            curvfast.save_factored(model, tmp_path)
        model.save_pretrained(tmp_path / "whole")
        curvfast.factorize(model, basis, mass=0.4)
        with pytest.raises(StorageError, match="another folder"):
            curvfast.save_factored(model, tmp_path / "whole")
        with pytest.raises(InputError, match="no model of transformers"):
            curvfast.save_factored(nn.Sequential(model.get_submodule(next(iter(basis)))), tmp_path)
        (tmp_path / "taken" / "config.json").mkdir(parents=True)
        with pytest.raises(StorageError, match="could not write"):
            curvfast.save_factored(model, tmp_path / "taken")
        assert [path.name for path in (tmp_path / "taken").iterdir()] == ["config.json"]
        with pytest.raises(InputError, match="save_factored"):
            curvfast.save_edited(model, curvfast.EditReport((), 0), tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"whole", "taken"}

    def test_what_cannot_be_read(self, measured, tmp_path) -> None:
        model, basis = measured
        curvfast.factorize(model, basis, mass=0.4)
        with pytest.raises(StorageError, match=r"curvfast\.json"):
            curvfast.load_factored(tmp_path)
        curvfast.save_factored(model, tmp_path)
        file = next(tmp_path.glob("*.safetensors"))
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        with pytest.raises(StorageError, match="damaged"):
            curvfast.load_factored(tmp_path)
        content[-1] ^= 1
        file.write_bytes(content)
        config = json.loads((tmp_path / "config.json").read_text())
        wider = {**config, "vocab_size": 64}
        (tmp_path / "config.json").write_text(json.dumps(wider))
        with pytest.raises(StorageError, match=r"config\.json"):
            curvfast.load_factored(tmp_path)

    @pytest.mark.parametrize(
        ("change", "error", "match"),
        [
            ({"architecture": "LlamaForNobody"}, InputError, "has no model 'LlamaForNobody'"),
            ({"architecture": "AutoConfig"}, InputError, "has no model"),
            (
                {"same": {"nothing.weight": 0}},
                StorageError,
                "'nothing.weight' that the model lacks",
            ),
        ],
    )
    def test_folders_of_another_transformers(self, tmp_path, change, error, match) -> None:
        from curvfast import storage

        model = llama()
        curvfast.factorize(model, basis_of(model), mass=0.4)
        curvfast.save_factored(model, tmp_path)
        meta, tensors = storage.open_folder(
            tmp_path, kind="curvfast-factored", index="curvfast.json"
        )
        whole = dict(tensors.items())
        if "same" in change:
            change = {"same": {"nothing.weight": next(iter(whole))}}
        with storage.FolderWriter(tmp_path, "curvfast-factored", index="curvfast.json") as writer:
            writer.add(whole)
            writer.finish({**meta, **change})
        with pytest.raises(error, match=match):
            curvfast.load_factored(tmp_path)
        with storage.FolderWriter(tmp_path, "curvfast-factored", index="curvfast.json") as writer:
            whole.pop("model.norm.weight")
            writer.add(whole)
            writer.finish(meta)
        with pytest.raises(StorageError, match=r"lacks 'model\.norm\.weight'"):
            curvfast.load_factored(tmp_path)
