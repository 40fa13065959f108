"""A model patched for a while: what the edit gives inside, the same bits afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import basis_of, gpt2, llama
from families import mixture

import curvfast
from curvfast.errors import InputError, PatchMismatch
from curvfast.export.patch import patched

pytestmark = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")
INTEGERS = {2: torch.int16, 4: torch.int32}


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        n: t.detach().clone().view(INTEGERS[t.element_size()]) for n, t in model.named_parameters()
    }


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("strength", [1.0, -0.5, 1.5, 0.0])
@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (llama, torch.bfloat16),
        (gpt2, torch.float32),
        (lambda: mixture("Mixtral"), torch.float32),
    ],
    ids=["llama", "gpt2", "mixtral"],
)
def test_inside_it_is_the_edit_of_that_strength_and_afterwards_nothing(
    make: Any, dtype: torch.dtype, strength: float
) -> None:
    model = make()
    basis = basis_of(model)
    model = model.to(dtype)
    layer = curvfast.model.layers.linear_layers(model)[next(iter(basis))]
    layer.parameter.data.view(-1)[0] = -0.0
    before, twin = bits(model), copy.deepcopy(model)
    patch = curvfast.make_patch(model, basis, mass=0.6)
    curvfast.edit(twin, basis, mass=0.6, strength=strength)
    with patched(model, [patch], strength=strength):
        if strength in (0, 1):
            assert equal(bits(model), bits(twin))
        else:
            # W' was rounded when the patch was made, and what is made of it is.
            for own, other in zip(model.parameters(), twin.parameters(), strict=True):
                units = 3 * torch.finfo(dtype).eps * own.detach().abs().max().item()
                torch.testing.assert_close(own, other, rtol=0, atol=units)
            assert not equal(bits(model), before)
    assert equal(bits(model), before)


def test_patches_follow_one_another_and_strength_is_of_all_of_them() -> None:
    model = llama()
    basis = basis_of(model)
    before, edited = bits(model), copy.deepcopy(model)
    original = {name: weight.double() for name, weight in copy.deepcopy(model).named_parameters()}
    first = curvfast.make_patch(edited, basis, mass=0.8)
    first.apply(edited)
    second = curvfast.make_patch(edited, basis, mass=0.4, layers="*.up_proj")
    second.apply(edited)
    with patched(model, [first, second]):
        assert equal(bits(model), bits(edited))
    with patched(model, [first, second], strength=-2.0):
        for name, weight in edited.named_parameters():
            wanted = original[name] - 2 * (weight.double() - original[name])
            assert torch.equal(model.get_parameter(name), wanted.float())
    assert equal(bits(model), before)
    # The second is of what the first gave.
    with pytest.raises(PatchMismatch, match="up_proj"), patched(model, [second, first]):
        pass
    assert equal(bits(model), before)


def test_a_failure_inside_or_of_a_later_patch_leaves_the_bits() -> None:
    model = llama()
    patch = curvfast.make_patch(model, basis_of(model), mass=0.6)
    before = bits(model)
    with pytest.raises(KeyError), patched(model, [patch], strength=0.5):
        raise KeyError
    assert equal(bits(model), before)
    with pytest.raises(PatchMismatch, match="applied already"), patched(model, [patch, patch]):
        pass
    assert equal(bits(model), before)
    other = llama(num_hidden_layers=4)
    foreign = curvfast.make_patch(other, basis_of(other), layers="*.3.mlp.*")
    with pytest.raises(PatchMismatch, match="lacks"), patched(model, [patch, foreign]):
        pass
    assert equal(bits(model), before)
    for strength in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="half"), patched(model, [patch], strength=strength):
            pass
