"""The CPU second moment against the definition: bitwise, or within torch's own error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curvfast import ops
from curvfast.errors import ShapeError
from curvfast.ops import cpu, reference

# Ragged on purpose: around a panel's width (128, 256) and a chunk's rows (1024), and tiny.
WIDTHS = (1, 7, 127, 128, 129, 255, 257, 300, 1030)
ROWS = (1, 5, 63, 1023, 1025)


def complete(function, x, **options):
    out = torch.zeros(x.shape[1], x.shape[1], dtype=options.pop("dtype", torch.float32))
    function.second_moment_(out, x, **{"rows": None, "scale": 1.0, **options})
    function.mirror_(out)
    return out


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("d", WIDTHS)
def test_integers_are_summed_bit_for_bit(d: int, dtype: torch.dtype) -> None:
    x = torch.randint(-4, 5, (37, d)).to(dtype)
    rows = torch.randperm(37)[:20].sort().values
    for options in ({}, {"rows": rows}, {"rows": rows[:0]}, {"scale": 4.0}):
        assert torch.equal(complete(ops, x, **options), complete(reference, x, **options))


@pytest.mark.parametrize("rows", ROWS)
def test_chunks_of_rows_join_without_a_seam(rows: int) -> None:
    x = torch.randint(-3, 4, (rows, 40)).bfloat16()
    assert torch.equal(complete(ops, x), complete(reference, x))
    index = torch.arange(0, rows, 2)
    assert torch.equal(complete(ops, x, rows=index), complete(reference, x, rows=index))


@pytest.mark.parametrize("view", ["columns", "transposed", "expanded"])
def test_strides_do_not_matter(view: str) -> None:
    base = torch.randint(-4, 5, (300, 300)).float()
    x = {"columns": base[:, ::2], "transposed": base.T, "expanded": base[:1].expand(50, 300)}[view]
    assert torch.equal(complete(ops, x), complete(reference, x.contiguous()))


@pytest.mark.parametrize("d", [64, 384, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_no_larger_than_torchs_own(d: int, dtype: torch.dtype) -> None:
    x = (torch.randn(2000, d) * torch.logspace(0, -4, d)).to(dtype)
    exact = x.double().T @ x.double()
    ours = (complete(ops, x).double() - exact).norm()
    torchs = (torch.zeros(d, d).addmm_(x.float().T, x.float()).double() - exact).norm()
    assert ours <= 1.5 * torchs + 1e-7 * exact.norm()


def test_sums_accumulate_over_calls() -> None:
    parts = torch.randint(-4, 5, (3, 50, 130)).float()
    out = torch.zeros(130, 130)
    for part in parts:
        ops.second_moment_(out, part)
    ops.mirror_(out)
    assert torch.equal(out, complete(reference, parts.flatten(0, 1)))


def test_mirroring_twice_is_mirroring_once() -> None:
    out = complete(ops, torch.randn(50, 300))
    twice = out.clone()
    ops.mirror_(twice)
    assert torch.equal(out, twice)
    assert torch.equal(out, out.T)


@given(st.integers(1, 2000))
@settings(max_examples=60, deadline=None)
def test_panels_cover_every_row_once(d: int) -> None:
    covered = [i for start, stop in cpu.panels(d) for i in range(start, stop)]
    assert covered == list(range(d))


@pytest.mark.parametrize(("out", "x"), [((3, 3), (5, 4)), ((4, 4), (2, 5, 4)), ((4, 3), (5, 4))])
def test_wrong_shapes_are_refused(out, x) -> None:
    with pytest.raises(ShapeError, match="flatten"):
        ops.second_moment_(torch.zeros(out), torch.zeros(x))
