"""The general selection against sorting, its twin and the staircase; masks and what they keep."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from curvfast import Mask, Selection, Staircase, ops
from curvfast.errors import InputError, LayerNotFound, ShapeError, StorageError
from curvfast.kfac.projection import drop_
from curvfast.kfac.selection.mask import random_mask, unpacked
from curvfast.kfac.selection.rule import Rule
from curvfast.kfac.selection.scores import masks
from curvfast.kfac.selection.staircase import (
    staircase_by_mass,
    staircases,
    staircases_by_common_mass,
    used_ranks,
)
from curvfast.ops import reference
from curvfast.ops.native import extension

native = pytest.mark.skipif(extension.unavailable() is not None, reason="built without a compiler")
MASSES = st.one_of(st.floats(0.01, 1.0), st.just(1.0))
# Ties, zeros of both signs, denormals, and neighbours that share their high half.
VALUES = st.one_of(
    st.integers(0, 3).map(float),
    st.sampled_from([0.0, -0.0, 1e-45, 1e-38, 1.1754944e-38, 3e38, 1.0, 1.0000001]),
    st.floats(0, 1e6, width=32),
)


def matrices(elements: st.SearchStrategy[float]) -> st.SearchStrategy[np.ndarray]:
    """Float32 matrices, most of which do not fill whole bytes."""

    def of(shape: tuple[int, int]) -> st.SearchStrategy[np.ndarray]:
        size = shape[0] * shape[1]
        values = st.lists(elements, min_size=size, max_size=size)
        return values.map(lambda v: np.array(v, np.float32).reshape(shape))

    return st.tuples(st.integers(1, 4), st.integers(1, 11)).flatmap(of)


def unpack(kept: reference.Kept, columns: int) -> np.ndarray:
    return np.unpackbits(kept.mask, axis=1, count=columns, bitorder="little").astype(bool)


@native
@given(st.lists(matrices(VALUES), min_size=1, max_size=3), MASSES, st.integers(1, 3), st.data())
@settings(max_examples=120, deadline=None)
def test_the_native_core_equals_its_twin_bit_for_bit(
    layers: list[np.ndarray], mass: float, workers: int, data: Any
) -> None:
    pairs = data.draw(st.integers(0, layers[0].size))
    one = [extension.scores_by_pairs(layers[0], pairs, workers)]
    two = [reference.scores_by_pairs(layers[0], pairs)]
    if any(layer.max() > 0 for layer in layers):
        one += extension.scores_by_mass(layers, mass, workers)
        two += reference.scores_by_mass(layers, mass)
    for found, twin in zip(one, two, strict=True):
        assert found.mask.tolist() == twin.mask.tolist()
        assert found[1:] == twin[1:]


SEARCHES = [
    pytest.param(reference, id="twin"),
    pytest.param(extension, id="native", marks=native),
]


def by_mass(backend: Any, layers: list[np.ndarray], mass: float) -> list[Any]:
    return backend.scores_by_mass(layers, mass, *([2] if backend is extension else []))


def by_pairs(backend: Any, scores: np.ndarray, pairs: int) -> Any:
    return backend.scores_by_pairs(scores, pairs, *([2] if backend is extension else []))


@pytest.mark.parametrize("backend", SEARCHES)
@given(st.lists(matrices(st.integers(0, 200)), min_size=1, max_size=3), st.integers(1, 16))
@settings(max_examples=60, deadline=None)
def test_mass_is_reached_by_the_largest_scores_of_all_layers(
    backend: Any, layers: list[np.ndarray], parts: int
) -> None:
    every = np.sort(np.concatenate([layer.ravel() for layer in layers]))[::-1].astype(np.float64)
    assume(every.any())
    # Sums of small integers, and their sixteenths, are exact.
    threshold = every[np.argmax(np.cumsum(every) >= parts / 16 * every.sum())]
    for kept, layer in zip(by_mass(backend, layers, parts / 16), layers, strict=True):
        expected = layer >= max(threshold, 1)
        assert unpack(kept, layer.shape[1]).tolist() == expected.tolist()
        assert kept.pairs == expected.sum()
        assert kept.mass == pytest.approx(layer[expected].sum() / max(1, layer.sum()))


@pytest.mark.parametrize("backend", SEARCHES)
@given(matrices(st.integers(0, 4)), st.data())
@settings(max_examples=60, deadline=None)
def test_pairs_are_exact_and_ties_go_in_row_order(
    backend: Any, scores: np.ndarray, data: Any
) -> None:
    pairs = data.draw(st.integers(0, scores.size))
    order = np.argsort(-scores.ravel(), kind="stable")[:pairs]
    kept = by_pairs(backend, scores, pairs)
    assert np.flatnonzero(unpack(kept, scores.shape[1])).tolist() == sorted(order.tolist())
    assert kept.pairs == pairs
    assert kept.mass == pytest.approx(scores.ravel()[order].sum() / max(1, scores.sum()))


@pytest.mark.parametrize("backend", SEARCHES)
def test_scores_too_small_to_be_normal_are_weighed_right(backend: Any) -> None:
    """Below 2^-126 floats lie evenly: the sum of denormals is of their integers."""
    integers = np.array([[1, 7, 7, 900, 2**22, 2**23, 2**23 + 2]], np.uint32)
    scores = integers.view(np.float32)
    weights = np.where(integers >> 23, 2**23 + (integers & 0x7FFFFF), integers).astype(np.float64)
    ordered = np.sort(weights[0])[::-1]
    for parts in range(1, 17):
        enough = ordered[np.argmax(np.cumsum(ordered) >= parts / 16 * ordered.sum())]
        kept = by_mass(backend, [scores], parts / 16)[0]
        assert unpack(kept, 7).tolist() == (weights >= enough).tolist()


@native
def test_a_large_layer_does_not_depend_on_the_threads() -> None:
    rng = np.random.default_rng(0)
    smooth = rng.random((3001, 1001), np.float32) ** 5
    # Two thousand values a thousand times each, so that ties end within many bands of rows.
    tied = rng.integers(1, 2000, (3001, 1001)).astype(np.float32)
    for scores in (smooth, tied):
        one, three = (extension.scores_by_mass([scores], 0.7, workers)[0] for workers in (1, 3))
        assert (one.mask == three.mask).all()
        assert one[1:] == three[1:]
        one, three = (extension.scores_by_pairs(scores, 1_234_567, workers) for workers in (1, 3))
        assert (one.mask == three.mask).all()
        order = np.argsort(-scores.ravel(), kind="stable")[:1_234_567]
        assert unpack(one, 1001).ravel()[order].all()


@native
def test_the_border_refuses_wrong_shapes_and_values() -> None:
    core = extension._C
    scores, mask = np.ones((3, 9), np.float32), np.full((3, 2), 7, np.uint8)
    a, b = scores.ctypes.data, mask.ctypes.data
    for rows, columns in ((0, 9), (3, 0), (-3, -9), (2**40, 9), (3, 2**40)):
        with pytest.raises(ValueError, match=r"empty|too many"):
            core.scores_by_mass([(a, rows, columns, b)], 0.5, 1)
        with pytest.raises(ValueError, match=r"empty|too many"):
            core.scores_by_pairs(a, rows, columns, b, 1, 1)
    for mass in (0.0, 1.5, np.nan):
        with pytest.raises(ValueError, match="mass must be"):
            core.scores_by_mass([(a, 3, 9, b)], mass, 2)
    for pairs in (-1, 28):
        with pytest.raises(ValueError, match="pairs must be"):
            core.scores_by_pairs(a, 3, 9, b, pairs, 2)
    with pytest.raises(TypeError):
        core.scores_by_mass([(a, 3, b)], 0.5, 1)
    assert (mask == 7).all()


@pytest.mark.parametrize("backend", SEARCHES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_what_is_no_score_is_refused(backend: Any, bad: float) -> None:
    scores = np.ones((3, 9), np.float32)
    scores[2, 8] = bad
    for search in (lambda: by_mass(backend, [scores], 0.5), lambda: by_pairs(backend, scores, 4)):
        with pytest.raises(ValueError, match="finite and non-negative"):
            search()
    with pytest.raises(ValueError, match="zero"):
        by_mass(backend, [0 * np.ones((3, 9), np.float32)], 0.5)


# Powers of two times small integers: products, and sums of them, are exact in float32 and float64.
SPECTRA = st.lists(
    st.one_of(st.integers(0, 4).map(float), st.sampled_from([0.0, 0.25, 64.0, 2.0**12])),
    min_size=1,
    max_size=12,
).map(lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64))


def rules(size: int) -> st.SearchStrategy[Rule]:
    return st.one_of(
        st.integers(1, 16).map(lambda parts: Rule(mass=parts / 16)),
        st.integers(0, size).map(lambda pairs: Rule(pairs=pairs)),
        st.floats(0, 1).map(lambda fraction: Rule(fraction=fraction)),
    )


@given(SPECTRA, SPECTRA, st.data())
@settings(max_examples=150, deadline=None)
def test_the_staircase_and_the_general_selection_agree(
    g: torch.Tensor, a: torch.Tensor, data: Any
) -> None:
    """By any rule, with ties, zero rows and all of the mass."""
    rule = data.draw(rules(len(g) * len(a)))
    assume(rule.mass is None or g[0] * a[0] > 0)
    stairs = staircases({"x": (g, a)}, rule)["x"]
    found = masks({"x": torch.outer(g, a)}, rule)["x"]
    assert torch.equal(found.dense(), stairs.dense())
    assert found.mass == pytest.approx(stairs.mass)


@given(st.lists(st.tuples(SPECTRA, SPECTRA), min_size=1, max_size=3), st.integers(1, 16))
@settings(max_examples=60, deadline=None)
def test_they_agree_on_a_common_threshold(layers: Any, parts: int) -> None:
    spectra = {str(i): pair for i, pair in enumerate(layers)}
    assume(any(g[0] * a[0] > 0 for g, a in layers))
    stairs = staircases_by_common_mass(spectra, parts / 16)
    scores = {name: torch.outer(g, a) for name, (g, a) in spectra.items()}
    found = masks(scores, Rule(mass=parts / 16, globally=True))
    for name in spectra:
        assert torch.equal(found[name].dense(), stairs[name].dense())


def test_they_agree_on_real_spectra_away_from_rounding() -> None:
    g, a = (
        torch.rand(d, dtype=torch.float64).pow(6).sort(descending=True).values for d in (90, 70)
    )
    products = torch.outer(g, a)
    for mass in (0.3, 0.9, 0.999):
        stairs = staircase_by_mass(g, a, mass)
        found = masks({"x": products}, Rule(mass=mass))["x"]
        differs = found.dense() != stairs.dense()
        assert ((products[differs] / stairs.threshold - 1).abs() < 1e-6).all()
        assert differs.sum() <= 2
        assert found.mass == pytest.approx(stairs.mass, rel=1e-6)


DENSE = st.tuples(st.integers(1, 300), st.integers(1, 40), st.integers(0, 2**32)).map(
    lambda of: torch.rand(of[:2], generator=torch.Generator().manual_seed(of[2])) < 0.3
)


@given(DENSE)
@settings(max_examples=100, deadline=None)
def test_packing_loses_nothing(dense: torch.Tensor) -> None:
    mask = Mask.pack(dense, 0.25)
    rows, columns = dense.shape
    assert torch.equal(mask.dense(), dense)
    assert mask.kept.shape == (rows, math.ceil(columns / 8))
    assert (mask.shape, mask.columns) == ((rows, columns), columns)
    assert mask.pairs == dense.sum()
    assert mask.fraction == pytest.approx(float(dense.float().mean()))
    rest = mask.complement()
    assert torch.equal(rest.dense(), ~dense)
    # Bits past the last column stay 0, or counting bits would count them.
    assert rest.pairs == (~dense).sum()
    assert rest.mass == 0.75
    used = [dense.any(dim).nonzero().flatten().tolist() for dim in (1, 0)]
    assert used_ranks(mask) == tuple(u[-1] + 1 if u else 0 for u in used)


@given(DENSE, st.data())
@settings(max_examples=60, deadline=None)
def test_dropping_is_multiplying_by_the_mask_or_its_leading_block(
    dense: torch.Tensor, data: Any
) -> None:
    rows, columns = (data.draw(st.integers(1, d)) for d in dense.shape)
    c = torch.randn(rows, columns)
    found = drop_(c.clone(), Mask.pack(dense))
    assert torch.equal(found, c * dense[:rows, :columns])


def test_a_mask_is_never_unpacked_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = unpacked

    def watched(bits: torch.Tensor, columns: int) -> torch.Tensor:
        out = original(bits, columns)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr("curvfast.kfac.selection.mask.unpacked", watched)
    mask = random_mask(1000, 33, 7000, torch.Generator())
    found = drop_(torch.ones(1000, 33), mask)
    assert found.sum() == 7000
    assert max(sizes) < 1000 * 33 / 3


def test_masks_that_do_not_fit_are_refused() -> None:
    for kept, columns in (
        (torch.zeros(3, 2, dtype=torch.uint8), 17),
        (torch.zeros(3, 2, dtype=torch.uint8), 8),
        (torch.zeros(3, 8, dtype=torch.bool), 8),
        (torch.zeros(3, dtype=torch.uint8), 8),
    ):
        with pytest.raises(ShapeError):
            Mask(kept, columns)


def test_bad_scores_are_named_and_nothing_else_is_asked_for() -> None:
    scores = torch.tensor([[3.0, 0.0, 1.0], [1.0, 0.5, 4.5]])
    assert masks({"x": scores}, Rule(mass=0.75))["x"].dense().tolist() == [
        [True, False, False], [False, False, True]
    ]  # fmt: skip
    infinite = torch.full((2, 3), math.inf)
    for bad in (-scores, scores * math.nan, infinite, torch.ones(3), torch.ones(0, 3)):
        for rule in (Rule(mass=0.5), Rule(pairs=1), Rule(mass=0.5, globally=True)):
            with pytest.raises(InputError, match="layer 'bad'"):
                masks({"good": scores, "bad": bad}, rule)
    with pytest.raises(InputError, match="score of layer 'zero' is zero"):
        masks({"zero": 0 * scores}, Rule(mass=0.5))
    with pytest.raises(InputError, match="every layer is zero"):
        masks({"zero": 0 * scores}, Rule(mass=0.5, globally=True))
    both = masks({"zero": 0 * scores, "x": scores}, Rule(mass=0.75, globally=True))
    assert Selection(both).pairs == {"zero": 0, "x": 2}
    assert masks({"zero": 0 * scores}, Rule(pairs=4))["zero"].pairs == 4


def test_rules_by_layer_name_are_each_layers_own() -> None:
    scores = {"x": torch.rand(4, 5), "y": torch.rand(4, 5)}
    assert Selection(masks(scores, Rule(pairs={"x": 3, "y": 7}))).pairs == {"x": 3, "y": 7}
    assert Selection(masks(scores, Rule(fraction={"x": 0.5, "y": 0.13}))).pairs == {"x": 10, "y": 3}
    spectra = {name: (torch.ones(4), torch.ones(5)) for name in scores}
    assert Selection(staircases(spectra, Rule(pairs={"x": 3, "y": 7}))).pairs == {"x": 3, "y": 7}
    with pytest.raises(LayerNotFound, match="pairs= says nothing about layer 'y'"):
        masks(scores, Rule(pairs={"x": 3}))
    with pytest.raises(InputError, match="4 x 5 = 20"):
        masks(scores, Rule(pairs=21))
    with pytest.raises(InputError, match=r"fraction=1\.1"):
        masks(scores, Rule(fraction=1.1))


@pytest.fixture
def selection() -> Selection:
    return Selection(
        {
            "model.0": staircase_by_mass([4.0, 2, 1], [3.0, 1, 0.2], 0.8),
            "model.1": random_mask(5, 11, 20, torch.Generator()),
            "empty": Staircase(torch.zeros(3, dtype=torch.int32), 4, math.inf, 0.0),
        },
        "kfac_saliency",
        "curvature",
        {"model.0": 1.25},
    )


def test_a_saved_selection_is_the_same(tmp_path: Any, selection: Selection) -> None:
    selection.save_pretrained(tmp_path)
    again = Selection.from_pretrained(tmp_path)
    assert list(again) == list(selection)
    for name, kept in selection.items():
        assert type(again[name]) is type(kept)
        assert torch.equal(again[name].dense(), kept.dense())
        assert again[name].mass == kept.mass or math.isnan(kept.mass)
    assert again["model.0"].widths.dtype == torch.int32
    assert again["model.0"].threshold == selection["model.0"].threshold
    assert again["empty"].threshold == math.inf
    assert math.isnan(again["model.1"].mass)
    assert (again.importance, again.frame) == ("kfac_saliency", "curvature")
    assert again.totals == {"model.0": 1.25}
    # No NaN or infinity: those are not JSON.
    json.loads((tmp_path / "config.json").read_text(), parse_constant=_refuse)


def _refuse(word: str) -> Callable[[], None]:
    raise AssertionError(word)


def test_a_damaged_or_foreign_selection_is_refused(tmp_path: Any, selection: Selection) -> None:
    selection.save_pretrained(tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(StorageError, match="damaged"):
        Selection.from_pretrained(tmp_path)
    with pytest.raises(StorageError):
        Selection.from_pretrained(tmp_path / "nowhere")


def test_the_reference_by_name_gives_the_same_bits() -> None:
    scores = np.arange(12, dtype=np.float32).reshape(3, 4)
    one = [*ops.scores_by_mass([scores], 0.5), ops.scores_by_pairs(scores, 5)]
    with ops.use_backend("reference"):
        two = [*ops.scores_by_mass([scores], 0.5), ops.scores_by_pairs(scores, 5)]
    for found, twin in zip(one, two, strict=True):
        assert found.mask.tolist() == twin.mask.tolist()
        assert found[1:] == twin[1:]
