"""Activation ratios, the detector and heat maps: against float64 definitions, row by row."""

from __future__ import annotations

import copy
import html
import math
import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from cases import gpt2, image_batches, keep_tokens, llama, token_batches, vit
from families import mixture
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import curvfast
from curvfast.analysis import auc, discriminative_layers, heat_map, telling_layers, token_scores
from curvfast.analysis.activations import readers
from curvfast.analysis.bands import band_ends, row_energies
from curvfast.analysis.detector import TextScores
from curvfast.analysis.statistics import draws, interval
from curvfast.errors import BasisMismatch, CoverageError, InputError, LayerNotFound
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.kfac.layer_basis import LayerBasis
from curvfast.model.layers import linear_layers, select

BANDS = (0.1, 0.25, 0.5, 1)


def random_basis(model: nn.Module, layers: str = "mlp") -> Eigenbasis:
    """An orthonormal basis for each layer; layers of one block that read one tensor share A."""
    found, shared = {}, {}
    for name, layer in select(model, layers).items():
        key = name.rsplit(".", 1)[0] if "gate" in name or "up" in name else name
        if key not in shared:
            shared[key] = _side(layer.d_in)
        found[name] = LayerBasis(*shared[key], *_side(layer.d_out))
    return Eigenbasis(found)


def _side(d: int) -> tuple[Tensor, Tensor]:
    values = torch.rand(d, dtype=torch.float64).sort(descending=True).values
    return values, torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0].float().contiguous()


def activations(
    model: nn.Module, batches: list[dict[str, Any]], name: str, *, outputs: bool = False
) -> list[list[Tensor]]:
    """Every position's input or output of a layer in float64: [text][position] -> [d]."""
    double = copy.deepcopy(model).double().eval()
    kept: list[Tensor] = []
    module = linear_layers(double)[name].module
    handle = module.register_forward_hook(lambda _m, x, y: kept.append(y if outputs else x[0]))
    found = []
    with torch.no_grad():
        for batch in batches:
            arguments = {k: v for k, v in batch.items() if k != "labels"}
            double(**{k: v.double() if v.is_floating_point() else v for k, v in arguments.items()})
            found += [
                list(text)
                for text in kept.pop().reshape(len(batch["labels"]), -1, kept_d(module, outputs))
            ]
    handle.remove()
    return found


def kept_d(module: nn.Module, outputs: bool) -> int:
    weight = module.weight
    transposed = type(module).__name__ == "Conv1D"
    return weight.shape[int(outputs) if transposed else 1 - int(outputs)]


def counted(batches: list[dict[str, Any]]) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for b in batches for row in keep_tokens(b)]


def norm_over_texts(rows: list[Tensor], basis: Tensor, start: int, stop: int, tokens: str) -> float:
    norms = [float((basis[:, start:stop].double().T @ row).norm()) for row in rows]
    if tokens == "rms":
        return math.sqrt(sum(n * n for n in norms) / len(norms))
    return sum(norms) / len(norms)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("tokens", ["mean", "rms", "last"])
def test_the_ratio_is_its_definition(make: Any, side: str, tokens: str) -> None:
    model = make()
    basis = random_basis(model)
    groups = [token_batches("right" if make is gpt2 else "both"), token_batches("right", (9, 14))]
    found = curvfast.activation_ratio(
        model, basis, *groups, side=side, tokens=tokens, samples=0, progress=False
    )
    assert found.layers == tuple(basis)
    outputs = side == "outputs"
    for row, name in enumerate(found.layers):
        layer = basis[name]
        vectors = layer.vectors_g if outputs else layer.vectors_a
        ends = [0, *(round(band * len(vectors)) for band in BANDS)]
        norms = []
        for batches in groups:
            texts = activations(model, batches, name, outputs=outputs)
            keep = counted(batches)
            rows = [
                t[p]
                for t, places in zip(texts, keep, strict=True)
                for p in (places[-1:] if tokens == "last" else places)
            ]
            norms.append([norm_over_texts(rows, vectors, a, b, tokens) for a, b in pairwise(ends)])
        expected = np.divide(*norms)
        np.testing.assert_allclose(found.ratio[row], expected, rtol=2e-5)


@pytest.mark.parametrize("tokens", ["mean", "energy", "last"])
def test_the_score_is_the_share_of_flat_energy(tokens: str) -> None:
    model = llama()
    basis = random_basis(model)
    batches = token_batches()
    found = curvfast.memorization_scores(
        model, basis, batches, flattest=0.3, tokens=tokens, progress=False
    )
    for column, name in enumerate(found.layers):
        vectors = basis[name].vectors_a.double()
        d = len(vectors)
        flat = vectors[:, d - round(0.3 * d) :]
        texts = activations(model, batches, name)
        for text, places in zip(range(len(texts)), counted(batches), strict=True):
            rows = torch.stack([texts[text][p] for p in places])
            part, whole = (rows @ flat).square().sum(1), rows.square().sum(1)
            expected = {
                "mean": (part / whole).mean(), "energy": part.sum() / whole.sum(),
                "last": part[-1] / whole[-1],
            }[tokens]  # fmt: skip
            torch.testing.assert_close(found.shares[text, column], expected, rtol=2e-5, atol=0)
    torch.testing.assert_close(found.of(), found.shares.mean(1))
    torch.testing.assert_close(found.of("*.down_proj"), found.shares[:, 2::3].mean(1))


def test_every_token_has_a_score_and_padding_has_none() -> None:
    model = llama()
    basis = random_basis(model)
    batch = token_batches(sizes=(11,))[0]
    found = token_scores(model, basis, batch, flattest=0.4)
    real = batch["attention_mask"].bool()
    assert torch.equal(found.isnan(), ~real)
    # gate, up and down weigh alike, although gate and up are projected once.
    expected = torch.zeros(real.shape, dtype=torch.float64)
    for name in basis:
        vectors = basis[name].vectors_a.double()
        flat = vectors[:, len(vectors) - round(0.4 * len(vectors)) :]
        for t, text in enumerate(activations(model, [batch], name)):
            for p, row in enumerate(text):
                expected[t, p] += (row @ flat).square().sum() / row.square().sum() / len(basis)
    torch.testing.assert_close(found[real], expected[real], rtol=2e-5, atol=0)


def test_neither_padding_nor_batches_nor_order_move_a_figure() -> None:
    model = llama()
    basis = random_basis(model)
    texts = [torch.randint(1, 61, (n,)) for n in (5, 8, 8, 11, 13, 6)]
    alone = [{"input_ids": text[None]} for text in texts]
    padded = _padded(texts, 16)
    shuffled = [padded[i] for i in (3, 0, 5, 1, 4, 2)]
    together = [
        {key: torch.cat([row[key] for row in part]) for key in part[0]}
        for part in (shuffled[:4], shuffled[4:])
    ]
    other = token_batches("right")
    one = curvfast.activation_ratio(model, basis, alone, other, samples=0, progress=False)
    two = curvfast.activation_ratio(model, basis, together, other, samples=0, progress=False)
    torch.testing.assert_close(one.ratio, two.ratio, rtol=1e-5, atol=0)
    a = curvfast.memorization_scores(model, basis, alone, progress=False).shares
    b = curvfast.memorization_scores(model, basis, together, progress=False).shares
    torch.testing.assert_close(a[[3, 0, 5, 1, 4, 2]], b, rtol=1e-5, atol=0)


def _padded(texts: list[Tensor], width: int) -> list[dict[str, Tensor]]:
    rows = []
    for text in texts:
        row = torch.full((1, width), 7)
        row[0, : len(text)] = text
        rows.append(
            {"input_ids": row, "attention_mask": (torch.arange(width) < len(text)).long()[None]}
        )
    return rows


def test_the_ratio_of_two_sets_is_the_inverse_of_the_other_way_round() -> None:
    model = llama()
    basis = random_basis(model)
    a, b = token_batches("right"), token_batches("none")
    one, other = (
        curvfast.activation_ratio(model, basis, *pair, samples=0, progress=False).ratio
        for pair in ((a, b), (b, a))
    )
    torch.testing.assert_close(one * other, torch.ones_like(one), rtol=1e-12, atol=0)
    same = curvfast.activation_ratio(model, basis, a, a, samples=0, progress=False).ratio
    assert torch.equal(same, torch.ones_like(same))


def test_texts_along_flat_directions_are_told_apart() -> None:
    """A linear layer fed with vectors of chosen components: ratios and scores are known exactly."""
    model = nn.Sequential(nn.Linear(10, 4))
    basis = random_basis(model, "all")
    vectors = basis["0"].vectors_a
    flat, curved = vectors[:, 8:].sum(1), vectors[:, :4].sum(1)
    a, b = (3 * flat + curved).expand(2, 3, 10), (flat + 2 * curved).expand(2, 3, 10)
    found = curvfast.activation_ratio(model, basis, [a], [b], bands=(0.4, 0.8, 1), progress=False)
    np.testing.assert_allclose(found.ratio[0][[0, 2]], [1 / 2, 3], rtol=1e-5)
    # All tokens are the same, so is every resample.
    np.testing.assert_allclose(found.low[0][[0, 2]], [1 / 2, 3], rtol=1e-5)
    scores = curvfast.memorization_scores(model, basis, [a, b], flattest=0.2, progress=False)
    np.testing.assert_allclose(scores.of(), [18 / 22] * 2 + [2 / 18] * 2, rtol=1e-5)


def test_rows_of_images_and_of_experts_count() -> None:
    images = vit()
    batches = image_batches()
    basis = random_basis(images)
    found = curvfast.memorization_scores(images, basis, batches, flattest=0.3, progress=False)
    assert found.shares.shape == (9, len(basis))
    name = next(iter(basis))
    vectors = basis[name].vectors_a.double()
    texts = [torch.stack(text) for text in activations(images, batches, name)]
    flat = vectors[:, len(vectors) - round(0.3 * len(vectors)) :]
    expected = [((t @ flat).square().sum(1) / t.square().sum(1)).mean() for t in texts]
    torch.testing.assert_close(found.shares[:, 0], torch.stack(expected), rtol=2e-5, atol=0)

    experts = mixture("Mixtral")
    basis = random_basis(experts, "*.mlp.experts.*")
    tokens = [{"input_ids": torch.randint(1, 61, (3, 20))} for _ in range(2)]
    each = [
        curvfast.memorization_scores(experts, basis, [b], progress=False).shares
        for b in ({"input_ids": row[None]} for batch in tokens for row in batch["input_ids"])
    ]
    whole = curvfast.memorization_scores(experts, basis, tokens, progress=False)
    torch.testing.assert_close(whole.shares, torch.cat(each), rtol=1e-4, atol=1e-6, equal_nan=True)
    assert torch.isfinite(whole.of()).all()


def test_layers_that_share_an_input_are_projected_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(num_hidden_layers=1)
    basis = random_basis(model)
    gate, up, down = basis
    assert readers(basis, basis) == {gate: gate, up: gate, down: down}
    found = curvfast.memorization_scores(model, basis, token_batches(), progress=False)
    assert torch.equal(found.shares[:, 0], found.shares[:, 1])
    assert not torch.equal(found.shares[:, 0], found.shares[:, 2])


def test_a_stored_basis_and_one_of_leading_vectors_give_the_same(tmp_path: Any) -> None:
    model = llama()
    basis = random_basis(model)
    batches = token_batches()
    whole = curvfast.memorization_scores(model, basis, batches, progress=False).shares
    basis.save_pretrained(tmp_path)
    stored = Eigenbasis.from_pretrained(tmp_path, lazy=True)
    assert readers(stored, stored) == readers(basis, basis)
    assert torch.equal(
        curvfast.memorization_scores(model, stored, batches, progress=False).shares, whole
    )
    leading = _leading(basis, 0.4)
    found = curvfast.memorization_scores(model, leading, batches, progress=False).shares
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-6)
    few = curvfast.activation_ratio(
        model, leading, batches, token_batches("none"), bands=(0.2, 1), samples=0, progress=False
    )
    assert (few.ratio > 0).all()
    with pytest.raises(InputError, match="holds the leading"):
        curvfast.activation_ratio(model, leading, batches, batches, progress=False)


def _leading(basis: Eigenbasis, part: float) -> Eigenbasis:
    return Eigenbasis(
        {
            name: LayerBasis(
                b.values_a, b.vectors_a[:, : round(part * len(b.values_a))], b.values_g, b.vectors_g
            )
            for name, b in basis.items()
        }
    )


def test_the_model_and_the_random_state_are_as_before() -> None:
    model = llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    model.model.layers[1].mlp.gate_proj.weight.requires_grad_(False)
    basis = random_basis(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    a, b = token_batches(), token_batches()
    state = torch.get_rng_state()
    one = curvfast.activation_ratio(model, basis, a, b, progress=False)
    token_scores(model, basis, a[0])
    with pytest.raises(ValueError, match="input_ids"):
        curvfast.memorization_scores(model, basis, [a[0], {"no_such": torch.ones(1)}])
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    # Eval mode: dropout would differ from call to call.
    again = curvfast.activation_ratio(model, basis, a, b, progress=False)
    assert torch.equal(one.ratio, again.ratio)
    assert torch.equal(one.low, again.low)
    other = curvfast.activation_ratio(model, basis, a, b, seed=1, progress=False)
    assert torch.equal(one.ratio, other.ratio)
    assert not torch.equal(one.low, other.low)


def test_intervals_cover_and_shrink_with_more_texts() -> None:
    model = llama()
    basis = random_basis(model)
    few, many = ([{"input_ids": torch.randint(1, 61, (n, 9))}] for n in (4, 64))
    found = [
        curvfast.activation_ratio(model, basis, texts, texts, samples=300, progress=False)
        for texts in (few, many)
    ]
    for each in found:
        assert ((each.low <= each.ratio) & (each.ratio <= each.high)).all()
    wide, narrow = ((f.high - f.low).mean() for f in found)
    # Four times as narrow in the mean, if texts and not tokens are drawn.
    assert 2 < wide / narrow < 8
    text = str(found[1])
    assert "50-100 %" in text
    assert len(text.splitlines()) == 1 + len(basis)
    plain = found[1].to_dict()
    assert plain["texts"] == [64, 64]
    assert plain["layers"][found[1].layers[0]]["ratio"] == found[1].ratio[0].tolist()


def test_resamples_draw_as_many_texts_as_there_are() -> None:
    weights = draws(7, 400, np.random.default_rng(0))
    assert weights.shape == (400, 7)
    assert (weights.sum(1) == 7).all()
    np.testing.assert_allclose(weights.mean(0), 1, atol=0.2)
    low, high = interval(np.arange(101.0)[:, None] * [1, np.nan], 0.9)
    np.testing.assert_allclose([low[0], high[0]], [5, 95])
    assert np.isnan([low[1], high[1]]).all()


def test_bands_by_mass_end_where_the_mass_is_reached() -> None:
    values = torch.tensor([5.0, 2, 1, 1, 1])
    assert band_ends(values, (0.5, 0.7, 0.75, 1), "mass") == [1, 2, 3, 5]
    assert band_ends(values, (0.1, 0.4, 1), "mass") == [1, 1, 5]
    assert band_ends(torch.ones(10), (0.3, 0.6), "mass") == [3, 6]
    # 1/7 of the rounded sum of seven 0.7 is more than 0.7.
    assert band_ends(torch.full((7,), 0.7, dtype=torch.float64), (1 / 7, 1), "mass") == [1, 7]
    assert band_ends(values, (0.2, 0.5, 1), "index") == [1, 2, 5]
    model = nn.Sequential(nn.Linear(5, 3))
    vectors = torch.eye(5)
    basis = Eigenbasis({"0": LayerBasis(values, vectors, torch.ones(3), torch.eye(3))})
    x = torch.tensor([[1.0, 2, 3, 4, 5]])[None]
    found = curvfast.activation_ratio(
        model, basis, [2 * x], [x], bands=(0.1, 0.4, 1), by="mass", samples=9, progress=False
    )
    assert found.ratio[0].tolist()[::2] == [2, 2]
    assert found.ratio[0, 1].isnan()
    assert found.to_dict()["layers"]["0"]["ratio"][1] is None


@given(st.integers(1, 30), st.lists(st.floats(0.01, 1), min_size=1, max_size=5, unique=True))
@settings(max_examples=30, deadline=None)
def test_bands_divide_the_energy(d: int, bands: list[float]) -> None:
    ends = band_ends(torch.ones(d), [*sorted(bands), 1], "index")
    generator = torch.Generator().manual_seed(d)
    vectors = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    x = torch.randn(4, d, generator=generator)
    energies = row_energies(x, vectors, ends, layer="x")
    torch.testing.assert_close(energies.sum(1), x.square().sum(1), rtol=1e-4, atol=1e-5)
    known = ends[-2] if len(ends) > 1 else 0
    torch.testing.assert_close(
        row_energies(x, vectors[:, :known], ends, layer="x"), energies, rtol=1e-3, atol=1e-4
    )


scores = st.lists(st.integers(-3, 3), min_size=1, max_size=12)


@given(scores, scores)
@settings(max_examples=80, deadline=None)
def test_the_auc_counts_pairs_and_halves_ties(high: list[int], low: list[int]) -> None:
    pairs = [(a > b) + 0.5 * (a == b) for a in high for b in low]
    assert auc(high, low) == pytest.approx(sum(pairs) / len(pairs), abs=1e-15)
    assert auc(low, high) == pytest.approx(1 - auc(high, low), abs=1e-15)


def test_layers_are_chosen_by_what_they_tell_apart() -> None:
    names = ("a", "b", "c")
    clean = TextScores(names, torch.tensor([[0.0, 0.5, 0.9], [0.2, 0.5, 0.8]]), 0.6)
    known = TextScores(names, torch.tensor([[0.1, 0.5, 0.95], [0.3, 0.5, 0.99]]), 0.6)
    assert discriminative_layers(known, clean, 2) == ("c", "a")
    assert known.of(discriminative_layers(known, clean, 1)).tolist() == pytest.approx([0.95, 0.99])
    unrouted = TextScores(("a", "b"), torch.tensor([[0.25, math.nan]]), 0.6)
    assert unrouted.of().tolist() == [0.25]
    high = torch.tensor([[0.9, 0.3, math.nan], [0.1, math.nan, 0.9]])
    low = torch.tensor([[0.5, math.nan, math.nan], [0.4, 0.2, math.nan]])
    sets = (TextScores(names, shares, 0.6) for shares in (high, low))
    # b is told by the one text of each that reached it, c by none, a no better than by chance.
    assert discriminative_layers(*sets, 3) == ("b", "a", "c")
    for count in (0, 4):
        with pytest.raises(InputError, match="count="):
            discriminative_layers(known, clean, count)
    with pytest.warns(DeprecationWarning, match="discriminative_layers"):
        assert telling_layers(known, clean, 2) == ("c", "a")
    with pytest.raises(LayerNotFound):
        known.of("d*")


def test_a_heat_map_holds_the_text_and_reddens_with_the_score() -> None:
    page = heat_map(["<b>", "a & b\n", "pad", "x"], [0.2, 0.6, math.nan, 0.4])
    spans = re.findall(r"<span([^>]*)>([^<]*)</span>", page)
    assert "".join(html.unescape(text) for _, text in spans) == "<b>a & b\npadx"
    strengths = [re.search(r"([\d.]+)\)", style) for style, _ in spans]
    assert [float(s[1]) if s else None for s in strengths] == [0, 1, None, 0.5]
    assert "0.0" in heat_map(["a"], [0.3])
    fixed = heat_map(["a", "b"], [0.5, 9.0], low=0, high=1)
    assert "0.500" in fixed
    assert "1.000" in fixed
    with pytest.raises(InputError, match="2 pieces and 1 scores"):
        heat_map(["a", "b"], [1])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"bands": ()}, "bands="), ({"bands": (0.5, 0.5)}, "bands="),
        ({"bands": (0.5, 1.1)}, "bands="),
        ({"by": "size"}, "by="), ({"side": "input"}, "side="), ({"tokens": "max"}, "tokens="),
        ({"samples": -1}, "samples="), ({"confidence": 1.0}, "confidence="),
    ],
)  # fmt: skip
def test_bad_arguments_of_the_ratio_are_refused_before_anything_runs(changes, match) -> None:
    model = llama()

    def texts():
        raise AssertionError("read")
        yield

    with pytest.raises(InputError, match=match):
        curvfast.activation_ratio(model, random_basis(model), texts(), texts(), **changes)


def test_bad_input_is_refused_with_a_reason() -> None:
    model = llama()
    basis = random_basis(model)
    ask = curvfast.memorization_scores
    for share in (0, 1):
        with pytest.raises(InputError, match="flattest="):
            ask(model, basis, token_batches(), flattest=share)
    with pytest.raises(InputError, match="tokens="):
        ask(model, basis, token_batches(), tokens="rms")
    with pytest.raises(InputError, match="hold no text"):
        ask(model, basis, [])
    with pytest.raises(LayerNotFound, match="matches none"):
        ask(model, basis, token_batches(), "attention")
    with pytest.raises(BasisMismatch, match="another model"):
        ask(gpt2(), basis, token_batches())
    masked = {"input_ids": torch.ones(2, 5).long(), "attention_mask": torch.zeros(2, 5).long()}
    with pytest.raises(CoverageError, match="counts"):
        ask(model, basis, [masked])
    with pytest.raises(InputError, match="no tensor"):
        ask(model, basis, [{}])
    idle = nn.ModuleDict({"model": llama(), "spare": nn.Linear(4, 4)})
    idle.forward = lambda input_ids: idle["model"](input_ids=input_ids)
    with pytest.raises(CoverageError, match="no row of 'spare' is seen"):
        token_scores(idle, random_basis(idle, "spare"), {"input_ids": torch.ones(2, 5).long()})
    with pytest.raises(InputError, match="pass numbers"):
        auc([], [1])
    with pytest.raises(InputError, match="pass numbers"):
        auc([math.nan], [1])
