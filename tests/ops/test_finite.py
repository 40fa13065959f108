"""Finite rows by every backend: any value that is not, wherever it stands, and no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from curvfast import ops
from curvfast.errors import ShapeError
from curvfast.ops import MomentRequest, TriangularSum, pack, reference
from curvfast.ops.native import extension

BACKENDS = ["auto", "torch", "reference"] + ["native"] * (extension.unavailable() is None)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BAD = [float("nan"), float("inf"), -float("inf")]


def finite(backend: str, x: Tensor, rows: Tensor | None = None) -> bool:
    with ops.use_backend(backend):
        return ops.all_finite(x, rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_greatest_and_the_least_numbers_are_finite(backend: str, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    values = [info.max, info.min, info.tiny, 0.0, -0.0, info.smallest_normal / 2]
    x = torch.tensor([values], dtype=torch.float64)
    x = torch.cat([x.to(dtype), torch.tensor([[info.max] * 6], dtype=dtype)])
    assert finite(backend, x)
    assert bool(ops.finite_flag(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", BAD)
def test_one_value_anywhere_is_found(backend: str, dtype: torch.dtype, bad: float) -> None:
    for rows, d in ((1, 1), (3, 7), (33, 31), (2100, 129)):
        for place in (0, d // 2, rows * d // 2, rows * d - 1):
            x = torch.randn(rows, d).to(dtype)
            assert finite(backend, x)
            x.view(-1)[place] = bad
            assert not finite(backend, x)
            assert not bool(ops.finite_flag(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_do_not_count_may_hold_anything(backend: str) -> None:
    x = torch.randn(4, 6, 5)
    x[1, 2, 3] = float("nan")
    rows = torch.tensor([0, 3, 9, 23])
    assert finite(backend, x, torch.tensor([0, 3, 7, 9, 23]))
    assert not finite(backend, x, torch.tensor([0, 3, 8]))
    assert finite(backend, x[:, :2])
    assert finite(backend, x[:, 3:])
    assert not finite(backend, x[:, 1:3])
    assert finite(backend, x, rows[:0])
    assert bool(ops.finite_flag(x, rows[:0]))
    assert bool(ops.finite_flag(x, rows))
    assert not bool(ops.finite_flag(x, torch.tensor([8])))
    assert finite(backend, x[:0])


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("view", ["columns", "transposed", "expanded"])
def test_strides_do_not_matter(backend: str, view: str) -> None:
    base = torch.randn(40, 40)
    views = {"columns": base[:, ::2], "transposed": base.T, "expanded": base[:1].expand(9, 40)}
    assert finite(backend, views[view])
    base[0, 0] = float("inf")
    assert not finite(backend, views[view])


@given(st.integers(1, 60), st.integers(1, 60), st.data())
def test_every_backend_says_what_the_definition_does(n: int, d: int, data: Any) -> None:
    x = torch.randn(n, d)
    for place in data.draw(st.lists(st.integers(0, n * d - 1), max_size=2)):
        x.view(-1)[place] = float("nan")
    rows = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), max_size=n)), dtype=torch.long)
    for backend in BACKENDS:
        assert finite(backend, x, rows) is reference.all_finite(x, rows)


def test_what_is_no_rows_is_refused() -> None:
    for x in (torch.ones(3), torch.ones(2, 2, dtype=torch.int64), torch.ones(1, 1, 1, 1)):
        with pytest.raises(ShapeError, match="floating-point rows"):
            ops.all_finite(x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", [0, 699, 700, 5999])
def test_a_sum_takes_all_of_a_call_or_nothing(backend: str, dtype: torch.dtype, place: int) -> None:
    # Of 512 features some thousand rows are packed at a time: a bad one may come much later.
    x = torch.randint(-4, 5, (6000, 512)).to(dtype)
    before = torch.randint(-4, 5, (512, 512)).float()
    before = before + before.T

    def add(rows: Tensor | None) -> tuple[bool, Tensor]:
        out = pack(before, ops.tile_width(512, None))
        with ops.use_backend(backend):
            added = ops.second_moment_if_finite_(MomentRequest(out, x, rows=rows))
        return added, out.dense()

    def expected(rows: Tensor) -> Tensor:
        out = TriangularSum.zeros(512, 512, dtype=torch.float64)
        reference.second_moment_(MomentRequest(out, x, rows=rows))
        return before + out.dense().float()

    kept = torch.cat([torch.arange(place), torch.arange(place + 1, 6000)])
    x[place, 100] = float("nan")
    added, found = add(None)
    assert not added
    assert torch.equal(found, before)
    added, found = add(kept)
    assert added
    assert torch.equal(found, expected(kept))
