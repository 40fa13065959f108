"""The second moment by every backend against the definition: bitwise, or within torch's own error.

The kernels run under Triton's interpreter, on tiles small enough for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curvfast import ops
from curvfast.errors import BackendUnavailable, InputError, ShapeError
from curvfast.ops import TriangularSum, blocked_second_moment, pack, reference, registry
from curvfast.ops.launch import group
from curvfast.ops.native import extension, instructions, second_moment
from curvfast.ops.requests import MomentRequest

# Ragged on purpose: around a panel's width (128, 256), a tile's (32), and tiny.
WIDTHS = {"torch": (1, 7, 127, 128, 129, 255, 257, 300, 1030), "triton": (1, 31, 32, 40, 96, 130)}
CASES = [(backend, d) for backend, widths in WIDTHS.items() for d in widths]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TILE = 32


def empty(backend: str, d: int) -> TriangularSum:
    return TriangularSum.zeros(d, TILE) if backend == "triton" else ops.new_sum(d)


def summed(backend: str, x: Tensor, **options: Any) -> Tensor:
    """Add x to an empty sum and read it."""
    out = empty(backend, x.shape[-1])
    with ops.use_backend(backend):
        ops.second_moment_(out, x, **options)
    return out.dense()


def defined(x: Tensor, **options: Any) -> Tensor:
    """The definition in float64."""
    out = TriangularSum.zeros(x.shape[-1], 16, dtype=torch.float64)
    reference.second_moment_(MomentRequest(out, x, **options))
    return out.dense()


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(-4, 5, shape).to(dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("backend", "d"), CASES)
def test_integers_are_summed_bit_for_bit(backend: str, d: int, dtype: torch.dtype) -> None:
    x = integers(37, d, dtype=dtype)
    rows = torch.randperm(37)[:20].sort().values
    for options in ({}, {"rows": rows}, {"rows": rows[:0]}, {"scale": 4.0}):
        assert torch.equal(summed(backend, x, **options).double(), defined(x, **options))


@pytest.mark.parametrize("backend", WIDTHS)
@pytest.mark.parametrize("rows", [1, 5, 63, 160, 1023, 1025])
def test_chunks_of_rows_join_without_a_seam(backend: str, rows: int) -> None:
    x = integers(rows, 40, dtype=torch.bfloat16)
    assert torch.equal(summed(backend, x).double(), defined(x))
    index = torch.arange(0, rows, 2)
    assert torch.equal(summed(backend, x, rows=index).double(), defined(x, rows=index))


@pytest.mark.parametrize("backend", WIDTHS)
@pytest.mark.parametrize("view", ["columns", "transposed", "expanded", "reversed", "offset"])
def test_strides_do_not_matter(backend: str, view: str) -> None:
    base = integers(90, 90, dtype=torch.bfloat16)
    x = {
        "columns": base[:, ::2],
        "transposed": base.T,
        "expanded": base[:1].expand(50, 90),
        "reversed": base.flip(0)[::3],
        "offset": base[1:, 3:83],
    }[view]
    assert torch.equal(summed(backend, x).double(), defined(x.contiguous()))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_position_can_be_dropped_without_a_copy(backend: str, dtype: torch.dtype) -> None:
    x = integers(3, 12, 40, dtype=dtype)
    x[:, -1] = float("nan")
    assert torch.equal(summed(backend, x[:, :-1]).double(), defined(x[:, :-1]))


@pytest.mark.parametrize("backend", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_past_a_sequences_length_do_not_count(backend: str, dtype: torch.dtype) -> None:
    x = integers(4, 11, 40, dtype=dtype)
    lengths = torch.tensor([11, 0, 3, 10], dtype=torch.int32)
    for i, length in enumerate(lengths.tolist()):
        x[i, length:] = float("nan")
    kept = torch.cat([x[i, :n] for i, n in enumerate(lengths.tolist())])
    assert torch.equal(summed(backend, x, lengths=lengths).double(), defined(kept))


@pytest.mark.parametrize("backend", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_squares_weigh_exactly(backend: str, dtype: torch.dtype) -> None:
    x = integers(70, 40, dtype=dtype)
    weights = torch.randint(0, 4, (70,)).float().square()
    repeated = x * weights.sqrt()[:, None].to(dtype)
    assert torch.equal(summed(backend, x, weights=weights).double(), defined(repeated))
    assert torch.equal(defined(x, weights=weights), defined(repeated))


@pytest.mark.parametrize("backend", WIDTHS)
@pytest.mark.parametrize("rows", [None, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_sums_in_one_pass_are_two_passes(backend: str, rows: Any, dtype: torch.dtype) -> None:
    x = integers(160, 70, dtype=dtype)
    first, second = (torch.randint(0, 3, (160,)).float().square() for _ in range(2))
    index = None if rows is None else torch.randperm(160)[:rows]
    for weights in (None, first):
        out, also = empty(backend, 70), empty(backend, 70)
        with ops.use_backend(backend):
            ops.second_moment_(
                out, x, rows=index, weights=weights, also=also, also_weights=second, scale=2.0
            )
        expected = defined(x, rows=index, weights=weights, scale=2.0)
        assert torch.equal(out.dense().double(), expected)
        expected = defined(x, rows=index, weights=second, scale=2.0)
        assert torch.equal(also.dense().double(), expected)


@pytest.mark.parametrize(("backend", "d"), [("torch", 64), ("torch", 1100), ("triton", 96)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_error_is_no_larger_than_torchs_own(
    backend: str, d: int, dtype: torch.dtype, weighted: bool
) -> None:
    if backend == "triton" and dtype == torch.bfloat16 and weighted:
        dtype = torch.float16  # the interpreter rounds to bfloat16 towards zero, a GPU to nearest
    x = (torch.randn(400, d) * torch.logspace(0, -4, d)).to(dtype)
    weights = torch.rand(400) if weighted else None
    exact = defined(x, weights=weights)
    ours = (summed(backend, x, weights=weights).double() - exact).norm()
    rows = x if weights is None else (x.float() * weights.sqrt()[:, None]).to(dtype)
    torchs = (torch.zeros(d, d).addmm_(rows.float().T, rows.float()).double() - exact).norm()
    # The kernels multiply float32 rows rounded to 16 bits of mantissa.
    rounding = 2**-15 if backend == "triton" and dtype == torch.float32 else 1e-7
    assert ours <= 1.5 * torchs + rounding * exact.norm()


@pytest.mark.parametrize(
    ("precision", "bound"), [("bf16x4", 2**-15), ("tf32", 2**-9), ("ieee", 1e-6)]
)
@pytest.mark.parametrize("chosen", [False, True])
def test_each_precision_of_float32_rows_is_as_good_as_it_says(
    precision: str, bound: float, chosen: bool
) -> None:
    x = torch.randn(200, 64) * torch.logspace(0, -3, 64)
    rows = torch.arange(0, 200, 3) if chosen else None
    exact = defined(x, rows=rows)
    found = summed("triton", x, rows=rows, precision=precision).double()
    assert (found - exact).norm() <= bound * exact.norm()
    # Positive semidefinite up to the rounding of a float32 sum.
    values = torch.linalg.eigvalsh(found)
    assert values[0] >= -1e-6 * values[-1]


@pytest.mark.parametrize("backend", WIDTHS)
def test_sums_accumulate_over_calls(backend: str) -> None:
    parts = integers(3, 50, 130)
    out = empty(backend, 130)
    with ops.use_backend(backend):
        for part in parts:
            ops.second_moment_(out, part)
    assert torch.equal(out.dense().double(), defined(parts.flatten(0, 1)))


@pytest.mark.parametrize("backend", WIDTHS)
def test_equal_calls_give_equal_bits(backend: str) -> None:
    x = torch.randn(300, 96).bfloat16()
    assert torch.equal(summed(backend, x), summed(backend, x))


@given(st.integers(1, 300), st.integers(1, 80))
@settings(max_examples=40, deadline=None)
def test_packing_and_reading_are_inverse(d: int, width: int) -> None:
    matrix = torch.randn(d, d)
    matrix = matrix + matrix.T
    packed = pack(matrix, width)
    assert torch.equal(packed.dense(), matrix)
    starts = [(start, stop) for start, stop, _ in packed.panels()]
    assert [i for start, stop in starts for i in range(start, stop)] == list(range(d))


def test_a_packed_sum_holds_half_a_matrix() -> None:
    packed = TriangularSum.zeros(4096, 128)
    assert packed.tiles.numel() == (4096**2 + 4096 * 128) // 2
    assert packed.tiles.numel() * 4 == ops.sum_bytes(4096, torch.device("cuda"))


def test_what_is_read_is_exactly_symmetric() -> None:
    found = summed("torch", torch.randn(500, 300))
    assert torch.equal(found, found.T)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 5, 4)}, ShapeError, "flatten"),
        ({"x": torch.zeros(5, 3)}, ShapeError, "3 features"),
        ({"x": torch.zeros(5, 4, dtype=torch.long)}, ShapeError, "int64"),
        ({"weights": torch.ones(4)}, ShapeError, "weights"),
        ({"lengths": torch.ones(5, dtype=torch.int32)}, ShapeError, "lengths="),
        ({"also": TriangularSum.zeros(4, 16)}, InputError, "belong together"),
        ({"precision": "fp8"}, InputError, "bf16x4"),
        ({"precision": "tf32"}, BackendUnavailable, "no backend"),
    ],
)
def test_wrong_arguments_are_refused(arguments: Any, error: type, message: str) -> None:
    given = {"x": torch.zeros(5, 4), **arguments}
    with pytest.raises(error, match=message):
        ops.second_moment_(TriangularSum.zeros(4, 16), **given)


@given(st.integers(1, 2000))
@settings(max_examples=60, deadline=None)
def test_panels_cover_every_column_once(d: int) -> None:
    out = TriangularSum.zeros(d, blocked_second_moment.panel_width(d))
    assert [i for start, stop, _ in out.panels() for i in range(start, stop)] == list(range(d))


@pytest.mark.parametrize("backend", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_sums_in_one_launch_are_many_launches(backend: str, dtype: torch.dtype) -> None:
    widths = (40, 96, 32, 72, 8)
    rows = torch.tensor([0, 3, 4, 60])
    inputs = [integers(65 + i, d, dtype=dtype) for i, d in enumerate(widths)]
    inputs.append(integers(9, 40, dtype=dtype)[:, ::1])
    for index in (None, rows):
        sums = [empty(backend, d) for d in widths]
        requests = [
            MomentRequest(out, x, rows=index, scale=2.0)
            for out, x in zip(sums, inputs[:5], strict=True)
        ]
        # A sum may be added to twice, also in one group.
        requests += [MomentRequest(sums[0], inputs[5]), MomentRequest(sums[3], inputs[3])]
        with ops.use_backend(backend):
            ops.second_moments_(requests)
        for i, (out, x) in enumerate(zip(sums, inputs[:5], strict=True)):
            expected = defined(x, rows=index, scale=2.0)
            if i == 0:
                expected += defined(inputs[5])
            if i == 3:
                expected += defined(x)
            assert torch.equal(out.dense().double(), expected), i


def test_no_launch_adds_to_one_sum_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs of one launch may run at once, which the interpreter never does."""
    launches = []
    original = group._launch
    monkeypatch.setattr(group, "_launch", lambda calls: (launches.append(calls), original(calls)))
    sums = [empty("triton", 32) for _ in range(3)]
    x = integers(9, 32, dtype=torch.bfloat16)
    with ops.use_backend("triton"):
        ops.second_moments_([MomentRequest(sums[i], x) for i in (0, 1, 0, 2, 1, 0)])
    assert launches
    for calls in launches:
        assert len({id(call.out) for call in calls}) == len(calls)
    assert [int(s.dense()[0, 0] / defined(x)[0, 0]) for s in sums] == [3, 2, 1]


def test_a_launch_holds_only_what_its_kernel_may_assume(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler is told that 8 divides d and the distance of rows; other layers go alone."""
    launches = []
    original = group._launch
    monkeypatch.setattr(group, "_launch", lambda calls: (launches.append(calls), original(calls)))
    wide = integers(70, 80, dtype=torch.bfloat16)
    inputs = [wide[:, :d] for d in (40, 36, 72, 33, 8)] + [wide[:, 8:48], wide[:, 1:41]]
    inputs += [integers(70, d, dtype=torch.bfloat16) for d in (33, 36)]
    sums = [empty("triton", x.shape[1]) for x in inputs]
    with ops.use_backend("triton"):
        ops.second_moments_([MomentRequest(s, x) for s, x in zip(sums, inputs, strict=True)])
    (calls,) = launches
    assert [call.d for call in calls] == [40, 72, 8, 40]
    assert all(call.x.stride(0) % 8 == 0 == call.x.data_ptr() % 16 for call in calls)
    for out, x in zip(sums, inputs, strict=True):
        assert torch.equal(out.dense().double(), defined(x)), x.shape


PACKED = [torch.float32, torch.bfloat16]


@pytest.mark.usefixtures("poisoned", "isa")
@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("d", [1, 7, 31, 32, 33, 64, 127, 255, 256, 300, 1000, 1030, 1300])
def test_packed_integers_are_summed_bit_for_bit(d: int, dtype: torch.dtype) -> None:
    for rows in (1, 2, 37, 257):
        x = integers(rows, d, dtype=dtype)
        index = torch.randperm(rows)[: rows // 2]
        for options in ({}, {"rows": index}, {"scale": 4.0}):
            assert torch.equal(summed("native", x, **options).double(), defined(x, **options))


@pytest.mark.usefixtures("poisoned", "isa")
@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("rows", [511, 512, 513, 1024, 1025, 1026, 2100])
def test_packed_blocks_of_rows_join_without_a_seam(rows: int, dtype: torch.dtype) -> None:
    x = integers(rows, 1030, dtype=dtype)
    assert torch.equal(summed("native", x).double(), defined(x))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", PACKED)
def test_packed_rows_may_lie_anywhere(dtype: torch.dtype) -> None:
    base = integers(90, 120, dtype=dtype)
    for x in (base[::2], base[:, 3:99], base.flip(0)[:50], base[:1].expand(9, 120)):
        assert torch.equal(summed("native", x).double(), defined(x))
    x = integers(4, 11, 40, dtype=dtype)
    lengths = torch.tensor([11, 0, 3, 10], dtype=torch.int32)
    assert torch.equal(summed("native", x[:, :-1]).double(), defined(x[:, :-1]))
    assert torch.equal(summed("native", x, lengths=lengths).double(), defined(x, lengths=lengths))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", PACKED)
def test_packed_rows_that_do_not_count_are_not_read(dtype: torch.dtype) -> None:
    x = integers(60, 40, dtype=dtype)
    x[1::2] = float("nan")
    index = torch.arange(0, 60, 2)
    assert torch.equal(summed("native", x, rows=index).double(), defined(x[::2]))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("width", [16, 20, 50, 200])
def test_packed_rows_fill_panels_of_any_width(width: int, dtype: torch.dtype) -> None:
    x = integers(40, 130, dtype=dtype)
    out = TriangularSum.zeros(130, width)
    before = out.tiles.clone()
    with ops.use_backend("native"):
        ops.second_moment_(out, x)
    assert torch.equal(out.dense().double(), defined(x))
    # What lies past the last feature stays zero, as reading and merging sums take for granted.
    last = out.tiles[(out.tiles.shape[0] // width - 1) * width :]
    assert torch.equal(last[:, 130 % width or width :], before[: len(last), 130 % width or width :])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", PACKED)
def test_packed_rows_have_torchs_error_on_any_number_of_threads(dtype: torch.dtype) -> None:
    x = (torch.randn(3000, 600) * torch.logspace(0, -4, 600)).to(dtype)
    exact = defined(x)
    sums = []
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        sums.append(summed("native", x))
    torch.set_num_threads(threads)
    assert torch.equal(*sums)
    torchs = (x.float().T @ x.float()).double()
    error = (sums[0] - exact).norm()
    assert error <= 2 * (torchs - exact).norm() + 1e-7 * exact.norm()
    # The spectrum as well: a matrix error can hide a half-random eigenspace.
    found, expected = (torch.linalg.eigvalsh(m.double()).flip(0) for m in (sums[0], exact))
    leading = expected > 1e-5 * expected[0]
    assert ((found - expected).abs() <= 1e-3 * expected)[leading].all()


@pytest.mark.usefixtures("isa")
def test_packed_float32_rows_are_weighted_on_the_way() -> None:
    x = integers(700, 70)
    first, second = (torch.randint(0, 3, (700,)).float().square() for _ in range(2))
    index = torch.randperm(700)[:640]
    out, also = empty("native", 70), empty("native", 70)
    with ops.use_backend("native"):
        ops.second_moment_(
            out, x, rows=index, weights=first, also=also, also_weights=second, scale=2.0
        )
    for found, weights in ((out, first), (also, second)):
        expected = defined(x, rows=index, weights=weights, scale=2.0)
        assert torch.equal(found.dense().double(), expected)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", PACKED)
def test_rows_are_packed_unasked_by_the_instructions_that_are_asked_for(dtype: torch.dtype) -> None:
    request = MomentRequest(TriangularSum.zeros(96, 96), integers(9, 96, dtype=dtype))
    assert registry.resolve("second_moment_", request.traits) is second_moment.second_moment_


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", PACKED)
def test_what_cannot_be_packed_goes_to_torch(dtype: torch.dtype) -> None:
    x = integers(9, 40, dtype=dtype)
    out = TriangularSum.zeros(40, 40)
    refused = [
        MomentRequest(out, x.half()),
        MomentRequest(out, integers(40, 9, dtype=dtype).T),
        MomentRequest(TriangularSum.zeros(40, 40, dtype=torch.float64), x),
    ]
    if dtype == torch.bfloat16:
        refused.append(MomentRequest(out, x, weights=torch.ones(9)))
    for request in refused:
        with ops.use_backend("native"), pytest.raises(BackendUnavailable):
            registry.resolve("second_moment_", request.traits)
        assert (
            registry.resolve("second_moment_", request.traits)
            is blocked_second_moment.second_moment_
        )


@pytest.mark.parametrize("odd", [False, True])
def test_every_bfloat16_number_is_multiplied_exactly(odd: bool, isa: str) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers = every[every.isfinite()].clone()
    expected = numbers.float()
    if isa == "avx512_bf16":
        # These instructions take subnormal numbers for zero.
        expected[expected.abs() < torch.finfo(torch.bfloat16).smallest_normal] = 0
    for values, exact in zip(numbers.split(1023), expected.split(1023), strict=True):
        x = torch.zeros(3, 1 + len(values), dtype=torch.bfloat16)
        x[int(odd)] = torch.cat([torch.ones(1, dtype=torch.bfloat16), values])
        out = TriangularSum.zeros(x.shape[1], 1024)
        with ops.use_backend("native"):
            ops.second_moment_(out, x)
        assert torch.equal(out.tiles[0, 1 : x.shape[1]], exact)


needs_core = pytest.mark.skipif(
    extension.unavailable() is not None, reason=extension.unavailable() or ""
)


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Pretend to have certain instruction sets only, and none asked for."""
    monkeypatch.delenv("CURVFAST_ISA", raising=False)
    known = ("portable", "avx2", "avx512", "avx512_bf16")

    def have(*names: str) -> None:
        instructions._decided.cache_clear()
        registry._resolved.cache_clear()
        monkeypatch.setattr(
            extension, "instruction_sets", lambda: {name: name in names for name in known}
        )

    yield have
    instructions._decided.cache_clear()
    registry._resolved.cache_clear()


@needs_core
@pytest.mark.parametrize("dtype", PACKED)
def test_rows_are_packed_unasked_where_it_is_faster_than_torch(
    dtype: torch.dtype, processor: Callable[..., None]
) -> None:
    request = MomentRequest(TriangularSum.zeros(96, 96), integers(9, 96, dtype=dtype))
    processor("portable", "avx2")
    assert registry.resolve("second_moment_", request.traits) is second_moment.second_moment_
    assert second_moment.packs(dtype, 96)
    assert ops.backends()["native"] == "available; second moments by avx2"
    processor("portable")
    assert (
        registry.resolve("second_moment_", request.traits) is blocked_second_moment.second_moment_
    )
    assert not second_moment.packs(dtype, 96)
    assert ops.backends()["native"] == "available; second moments by portable, where named"
    with ops.use_backend("native"):
        assert registry.resolve("second_moment_", request.traits) is second_moment.second_moment_


@needs_core
@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ("avx512", BackendUnavailable, r"CURVFAST_ISA=avx512: .* has portable, avx2: .* or unset"),
        ("sse", InputError, r"CURVFAST_ISA: .*'sse'; there are portable, .* and auto"),
    ],
)
def test_instructions_that_cannot_be_had_are_refused(
    asked: str,
    error: type[Exception],
    message: str,
    processor: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processor("portable", "avx2")
    monkeypatch.setenv("CURVFAST_ISA", asked)
    out, x = TriangularSum.zeros(96, 96), integers(9, 96)
    with pytest.raises(error, match=message):
        ops.second_moment_(out, x)
    assert re.match(message, ops.backends()["native"])
    with pytest.raises(BackendUnavailable, match=message):
        ops.use_backend("native").__enter__()
    # Who asks for another backend has no use for any.
    with ops.use_backend("torch"):
        ops.second_moment_(out, x)


@needs_core
@pytest.mark.parametrize("name", ["", "sse", "PORTABLE"])
def test_the_core_knows_its_instruction_sets_by_name(name: str) -> None:
    out, x, room = TriangularSum.zeros(3, 3), torch.ones(1, 3), torch.zeros(32, dtype=torch.int32)
    with pytest.raises(ValueError, match="no instruction set"):
        extension.add_rows(
            out.tiles, 3, x, torch.zeros(1, dtype=torch.long), None, room, 1, False, name, 1
        )
    assert not out.tiles.any()
