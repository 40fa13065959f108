"""Projections by every plan and backend equal the definition; plans execute what they count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

from curvfast import ops
from curvfast.errors import BackendUnavailable, InputError, ShapeError
from curvfast.kfac.selection.staircase import staircase_by_mass
from curvfast.ops import reference
from curvfast.ops.native import extension
from curvfast.ops.projection import Plan, bands, dense_flops, plan, transposed_widths


def orthonormal(d: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0].to(dtype)


def power_law(rows: int, columns: int, power: float, mass: float) -> Tensor:
    g, a = (1 / np.arange(1, d + 1) ** power for d in (rows, columns))
    return staircase_by_mass(g, a, mass).widths


def defined(weight: Tensor, left: Tensor, right: Tensor, widths: Tensor) -> Tensor:
    kept = torch.arange(weight.shape[1]) < widths[:, None]
    return left @ (kept * (left.T @ weight @ right)) @ right.T


@st.composite
def staircases(draw: Any) -> tuple[int, int, Tensor]:
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    widths = draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows))
    return rows, columns, torch.tensor(sorted(widths, reverse=True))


@given(staircases(), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_every_plan_is_the_definition(case: tuple[int, int, Tensor], band: int) -> None:
    rows, columns, widths = case
    weight = torch.randn(rows, columns, dtype=torch.float64)
    left, right = orthonormal(rows), orthonormal(columns)
    expected = defined(weight, left, right, widths)
    best = plan(widths.numpy(), columns, band=band)
    tries = [best, replace(best, dense=True, complement=False)]
    for split in {0, int((widths > 0).sum()) // 2, int((widths > 0).sum())}:
        reach = int(widths[split]) if split < rows else 0
        tries.append(Plan(rows, columns, split, reach, complement=False, dense=False, flops=0))
    removed = columns - widths.flip(0)
    for split in {0, rows // 2, rows}:
        reach = int(removed[split]) if split < rows else 0
        tries.append(Plan(rows, columns, split, reach, complement=True, dense=False, flops=0))
    for using in tries:
        found = ops.project(weight, left, right, widths, using=using)
        assert (found - expected).norm() <= 1e-12 * weight.norm(), using
        found = ops.project(weight, left, right, widths, using=using, residual=True)
        assert (weight - found - expected).norm() <= 1e-12 * weight.norm(), using


@pytest.mark.parametrize(("mass", "share"), [(0.8, 0.12), (0.9, 0.25), (0.99, 0.62)])
def test_a_plan_needs_a_fraction_of_the_dense_work(mass: float, share: float) -> None:
    found = plan(power_law(4096, 4096, 1.0, mass).numpy(), 4096)
    assert found.share <= share
    assert found.flops == pytest.approx(found.share * 4 * 4096**2 * 8192)


@given(staircases(), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_no_plan_exceeds_the_dense_work(case: tuple[int, int, Tensor], band: int) -> None:
    rows, columns, widths = case
    assert plan(widths.numpy(), columns, band=band).flops <= dense_flops(rows, columns)


@pytest.mark.parametrize(("power", "mass"), [(1.0, 0.8), (1.0, 0.99), (0.7, 0.9), (0.0, 0.5)])
def test_what_is_executed_is_what_the_plan_counts(power: float, mass: float) -> None:
    rows, columns = 512, 384
    widths = power_law(rows, columns, power, mass)
    weight, left, right = torch.randn(rows, columns), torch.eye(rows), torch.eye(columns)
    found = plan(widths.numpy(), columns)

    def in_place(_out: Any, a: Any, b: Any, *rest: Any, **options: Any) -> int:
        return addmm_flop(a, a, b)

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as count:
        ops.project(weight, left, right, widths)
    assert count.get_total_flops() == found.flops


def test_keeping_everything_costs_nothing_and_changes_no_bit() -> None:
    weight = torch.randn(40, 30)
    widths = torch.full((40,), 30)
    assert plan(widths.numpy(), 30).flops == 0
    found = ops.project(
        weight, orthonormal(40, weight.dtype), orthonormal(30, weight.dtype), widths
    )
    assert torch.equal(found, weight)


@given(staircases())
@settings(max_examples=60, deadline=None)
def test_transposing_a_staircase_turns_its_mask(case: tuple[int, int, Tensor]) -> None:
    rows, columns, widths = case
    mask = torch.arange(columns) < widths[:, None]
    turned = (
        torch.arange(rows) < torch.from_numpy(transposed_widths(widths.numpy(), columns))[:, None]
    )
    assert torch.equal(turned, mask.T)


@given(staircases(), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_bands_hold_the_staircase(case: tuple[int, int, Tensor], band: int) -> None:
    rows, columns, widths = case
    covered = torch.zeros(rows, columns, dtype=torch.bool)
    for start, stop, width in bands(widths.numpy(), band):
        assert not covered[start:stop].any()
        covered[start:stop, :width] = True
    assert covered[torch.arange(columns) < widths[:, None]].all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", ["kept", "removed", "rows", "columns", "dense"])
@pytest.mark.parametrize(("rows", "columns"), [(70, 90), (96, 64), (33, 31)])
def test_the_kernels_are_the_definition(kind: str, rows: int, columns: int) -> None:
    mass = {"kept": 0.8, "removed": 0.995}.get(kind, 0.9)
    widths = power_law(rows, columns, 1.0, mass)
    used = int((widths > 0).sum())
    reach = int(widths[0])
    best = plan(widths.numpy(), columns, band=8)
    using = {
        "kept": replace(best, split=used // 3, reach=int(widths[used // 3]), complement=False),
        "removed": replace(
            best, split=5, reach=int((columns - widths.flip(0))[5]), complement=True
        ),
        "rows": replace(best, split=used, reach=0, complement=False),
        "columns": replace(best, split=0, reach=reach, complement=False),
        "dense": replace(best, dense=True, complement=False),
    }[kind]
    using = replace(using, dense=kind == "dense")
    weight = torch.randn(rows, columns)
    left, right = orthonormal(rows, weight.dtype), orthonormal(columns, weight.dtype)
    expected = defined(weight.double(), left.double(), right.double(), widths)
    with ops.use_backend("triton"):
        found = ops.project(weight, left, right, widths, using=using)
    assert (found - expected).norm() <= 1e-5 * weight.norm()


def test_the_kernels_mask_exactly() -> None:
    """With identities for bases the projection is the mask itself: bitwise."""
    weight = torch.randint(1, 9, (70, 50)).float()
    widths = power_law(70, 50, 0.8, 0.7)
    for split in (0, 20, 69):
        using = Plan(70, 50, split, int(widths[split]), complement=False, dense=False, flops=0)
        with ops.use_backend("triton"):
            found = ops.project(weight, torch.eye(70), torch.eye(50), widths, using=using)
        assert torch.equal(found, weight * (torch.arange(50) < widths[:, None]))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"left": torch.eye(3)}, ShapeError, "needs left"),
        ({"widths": torch.tensor([1, 2, 0, 0])}, ShapeError, "fall"),
        ({"widths": torch.tensor([9, 2, 0, 0])}, ShapeError, "at most 5"),
        ({"precision": "fp8"}, InputError, "tf32x3"),
        ({"precision": "tf32"}, BackendUnavailable, "no backend"),
    ],
)
def test_wrong_arguments_are_refused(changes: Any, error: type, message: str) -> None:
    given = {
        "weight": torch.randn(4, 5), "left": torch.eye(4), "right": torch.eye(5),
        "widths": torch.tensor([5, 2, 1, 0]), **changes,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        ops.project(**given)


@given(
    st.lists(st.integers(0, 90), min_size=1, max_size=200).map(sorted),
    st.integers(0, 30),
    st.integers(1, 150),
)
@settings(max_examples=400, deadline=None)
def test_the_native_split_equals_its_twin(rising: list[int], more: int, band: int) -> None:
    if extension.unavailable():
        pytest.skip("built without a compiler")
    widths = np.array(rising[::-1], np.int64)
    columns = int(widths[0]) + more
    found = extension.cheapest_split(widths, columns, band)
    assert found == reference.cheapest_split(widths, columns, band)


def test_the_border_refuses_what_is_no_staircase() -> None:
    if extension.unavailable():
        pytest.skip("built without a compiler")
    for bad, columns, band in (([1, 2], 5, 1), ([3, 2], 2, 1), ([2, -1], 5, 1), ([2, 1], 5, 0)):
        with pytest.raises(ValueError, match=r"widths|band"):
            extension.cheapest_split(np.array(bad), columns, band)
    with pytest.raises(ValueError, match="null"):
        extension._C.cheapest_split(0, 3, 3, 1)
    with pytest.raises(ValueError, match="empty"):
        extension._C.cheapest_split(np.zeros(1, np.int64).ctypes.data, 0, 3, 1)
