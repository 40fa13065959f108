"""Each step of benchmarks/official.py against its definition, and the whole against ours."""

from __future__ import annotations

import copy
from itertools import product

import numpy as np
import official
import pytest
import torch
from cases import llama
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import brute_force
from torch.nn.functional import cross_entropy

from curvfast import Factors, LayerFactors
from curvfast.model.layers import select
from curvfast.ops import reference

PRIMES = [n for n in range(2, 100) if all(n % k for k in range(2, n))]


def summed_loss(output, batch):
    logits = output.logits[:, :-1].flatten(0, 1)
    return cross_entropy(logits, batch["input_ids"][:, 1:].flatten(), reduction="sum")


@pytest.fixture(scope="module")
def measured():
    """Means, the model, its layers and batches, and the oracle's rows."""
    torch.manual_seed(3)
    model = llama().double()
    batches = [{"input_ids": torch.randint(61, (3, 7))} for _ in range(2)]
    layers = list(select(model, "mlp"))
    found = official.collect(model, batches, layers, dtype=torch.float64)
    keep = torch.arange(7).expand(3, 7) < 6
    records = brute_force(copy.deepcopy(model), layers, batches, lambda _: keep, summed_loss)
    return model, batches, found, records


def test_the_collector_sums_every_position_but_the_last(measured) -> None:
    _, _, found, records = measured
    assert found.rows == 2 * 3 * 6
    sums = found.sums()
    assert sums.keys() == records.keys()
    for name, record in records.items():
        a, g, rows = record.moments()
        assert rows == found.rows
        # Each batch has 18 labels, and its loss is their mean.
        means = (found.a[name], a / rows), (found.g[name], g / 18**2 / rows)
        for theirs, true in (*zip(sums[name], (a, g), strict=True), *means):
            # transformers' norms compute in float32, and the two losses differ in scale.
            torch.testing.assert_close(theirs, true, rtol=0, atol=1e-6 * float(true.max()))


def test_sampled_labels_follow_the_models_prediction(measured) -> None:
    """Of a certain prediction the label is the prediction, and no gradient is left."""
    model, batches, found, _ = measured
    certain = copy.deepcopy(model)
    with torch.no_grad():
        certain.lm_head.weight.mul_(1e6)
    sampled = official.collect(certain, batches, list(found.a), dtype=torch.float64, sampled=True)
    for name, g in sampled.g.items():
        assert float(g.abs().max()) < 1e-6 * float(found.g[name].abs().max())
        torch.testing.assert_close(sampled.a[name], found.a[name])


def test_the_collector_computes_weight_gradients_and_leaves_nothing(measured, monkeypatch) -> None:
    model, batches, _, _ = measured
    cleared = []

    def zero_grad() -> None:
        cleared.append({name for name, p in model.named_parameters() if p.grad is not None})
        for parameter in model.parameters():
            parameter.grad = None

    monkeypatch.setattr(model, "zero_grad", zero_grad)
    layers = list(select(model, "mlp"))[:1]
    official.collect(model, batches, layers)
    assert cleared == [set(dict(model.named_parameters()))] * len(batches)
    layer = model.get_submodule(layers[0])
    assert not layer._forward_hooks
    assert not layer._backward_hooks


def test_layers_of_one_input_each_have_a_sum_of_their_own(measured) -> None:
    _, _, found, _ = measured
    gate, up = (found.a[f"model.layers.0.mlp.{name}_proj"] for name in ("gate", "up"))
    assert torch.equal(gate, up)
    assert gate.data_ptr() != up.data_ptr()


def test_eigh_is_descending_and_float32() -> None:
    x = torch.randn(40, 12, dtype=torch.float64)
    matrix = x.T @ x
    values, vectors = official.eigh(matrix)
    assert values.dtype == vectors.dtype == torch.float32
    expected = torch.linalg.eigvalsh(matrix).flip(0)
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)
    values, vectors = values.double(), vectors.double()
    torch.testing.assert_close((vectors * values) @ vectors.T, matrix, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(12).double(), rtol=0, atol=1e-5)


def descending(primes: list[int]) -> st.SearchStrategy[torch.Tensor]:
    """Eigenvalues whose sums are exact in float32; two disjoint lists have distinct products."""
    some = st.lists(st.sampled_from(primes), min_size=1, max_size=10, unique=True)
    return some.map(lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float32))


# The sum reaches ρ exactly: nothing more is popped.
@example(torch.tensor([1.0]), torch.tensor([3.0, 1.0]), 0.75)
@settings(deadline=None, max_examples=60)
@given(descending(PRIMES[::2]), descending(PRIMES[1::2]), st.floats(0.01, 1.0))
def test_the_heap_pops_what_sorting_every_product_finds(values_g, values_a, mass) -> None:
    popped = official.top_pairs(values_g, values_a, mass)
    everything = product(range(len(values_g)), range(len(values_a)))
    ranked = sorted(everything, key=lambda p: -float(values_g[p[0]] * values_a[p[1]]))
    held = np.cumsum([float(values_g[i] * values_a[j]) for i, j in ranked])
    crossing = int(np.argmax(held >= mass * held[-1]))
    assert popped == ranked[: crossing + 1]
    widths = reference.staircase_by_mass(values_g.double().numpy(), values_a.double().numpy(), mass)
    mask = official.dense_mask(popped, (len(values_g), len(values_a)))
    assert mask.sum(1).tolist() == widths.widths.tolist()


def test_the_mask_is_true_at_the_pairs_alone() -> None:
    pairs = [(0, 0), (1, 0), (0, 2)]
    expected = torch.tensor([[True, False, True], [True, False, False]])
    assert torch.equal(official.dense_mask(pairs, (2, 3)), expected)
    assert not official.dense_mask([], (2, 3)).any()


def test_the_projection_is_its_formula() -> None:
    weight = torch.randn(6, 9)
    left, right = (torch.linalg.qr(torch.randn(d, d))[0] for d in (6, 9))
    mask = torch.rand(6, 9) < 0.5
    found = official.project(weight, left, right, mask)
    assert found.dtype == torch.float32
    w, u, v = weight.double(), left.double(), right.double()
    expected = torch.einsum("op,pq,iq->oi", u, torch.einsum("op,oi,iq->pq", u, w, v) * mask, v)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mass", [0.3, 0.8, 1.0])
def test_the_edit_is_ours(mass: float) -> None:
    weight = torch.randn(10, 14)
    a, g = ((x := torch.randn(50, d) * torch.logspace(0, -2, d)).T @ x / 50 for d in (14, 10))
    found = official.edit(weight, a, g, mass)
    basis = Factors({"x": LayerFactors(a, g, 1, 1)}).eigh()
    widths = basis.keep(mass=mass)["x"].widths
    u, v = basis["x"].vectors_g.double(), basis["x"].vectors_a.double()
    mask = torch.arange(14) < widths[:, None]
    assert 0 < mask.sum() <= mask.numel()
    expected = u @ ((u.T @ weight.double() @ v) * mask) @ v.T
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
