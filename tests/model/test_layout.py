"""How rows lie over a grid of positions: against loops over indices."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curvfast.model.layout import layouts

SIZE = st.integers(1, 5)


@given(SIZE, SIZE, st.booleans())
def test_a_grid_explains_itself_and_what_flattens_it_in_one_way(b: int, t: int, ones: bool) -> None:
    numbers = torch.arange(b * t).view(b, t)
    for shape in (numbers.shape, torch.Size([b * t]), torch.Size([1, b * t])):
        found = layouts(shape, numbers.shape)
        if t == 1 and shape != numbers.shape:
            continue  # one row a position, or one a sequence
        assert len(found) == 1
        assert torch.equal(found[0].positions(), numbers.reshape(shape))
        assert found[0].in_order


@given(SIZE, SIZE)
def test_exchanged_axes_are_known_by_shape_or_by_being_told(b: int, t: int) -> None:
    numbers = torch.arange(b * t).view(b, t)
    told = layouts(torch.Size([t, b]), numbers.shape, True)
    assert any(torch.equal(each.positions(), numbers.T) for each in told)
    untold = layouts(torch.Size([t, b]), numbers.shape)
    if b != t and 1 not in (b, t):
        assert [each.kind for each in untold] == ["transposed"]
        assert torch.equal(untold[0].positions(), numbers.T)
    elif b == t:
        assert torch.equal(untold[0].positions(), numbers)


@given(st.permutations([0, 1, 2]), st.sampled_from([(2, 3, 4), (3, 2, 5), (2, 5, 7)]))
def test_further_axes_are_spread_over(order: list[int], sizes: tuple[int, int, int]) -> None:
    b, t, h = sizes
    numbers = torch.arange(b * t).view(b, t)
    full = numbers[:, :, None].expand(b, t, h).permute(*order)
    found = layouts(full.shape, numbers.shape)
    assert len(found) == 1
    assert torch.equal(found[0].positions(), full)
    assert torch.equal(found[0].spread(numbers * 2), full * 2)


def test_an_axis_that_may_be_either_is_explained_in_two_ways() -> None:
    assert len(layouts(torch.Size([2, 3, 3]), torch.Size([2, 3]))) == 2


@pytest.mark.parametrize("shape", [[2], [2, 1], [1, 2]])
def test_one_row_a_sequence_is_pooled(shape: list[int]) -> None:
    found = layouts(torch.Size(shape), torch.Size([2, 3]))
    kinds = [each.kind for each in found]
    assert kinds == (["pooled"] if shape[0] == 2 else [])


@pytest.mark.parametrize("shape", list(permutations([2, 3, 4])))
def test_several_axes_of_sequences_are_flattened(shape: tuple[int, ...]) -> None:
    grid = torch.Size(shape)
    numbers = torch.arange(24).view(grid)
    flat = torch.Size([shape[0] * shape[1], shape[2]])
    for own in (grid, flat, torch.Size([24])):
        found = layouts(own, grid)
        assert len(found) == 1
        assert torch.equal(found[0].positions(), numbers.reshape(own))


def test_what_has_another_number_of_rows_is_not_explained() -> None:
    grid = torch.Size([3, 5])
    for shape in ([3, 4], [14], [5], [1, 5], [6, 2, 4]):
        assert not layouts(torch.Size(shape), grid)
