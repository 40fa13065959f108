"""Packed sums copied in and out: every way bit for bit the definition, and nothing read astray."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curvfast import ops
from curvfast.errors import BackendUnavailable, ShapeError
from curvfast.ops import TriangularSum, pack, packed_layout, reference, registry
from curvfast.ops.native import extension, extension_cuda, packed_symmetric

needs_native = pytest.mark.skipif(
    extension.unavailable() is not None, reason=extension.unavailable() or ""
)
FLOATS = [torch.float32, torch.float64]
BACKENDS = ["torch", "reference", "triton", pytest.param("native", marks=needs_native)]
# Around a block of the C++ (64) and of the kernels (32), and of several.
sizes = st.integers(1, 200) | st.sampled_from([31, 32, 33, 63, 64, 65, 127, 128, 129, 300])
dtypes = st.sampled_from(FLOATS)


def odd(*shape: int, dtype: torch.dtype) -> Tensor:
    """Values whose every bit shows: signed zeros, infinities and NaN among them."""
    values = torch.randn(shape, dtype=dtype)
    kinds = torch.tensor([-0.0, float("inf"), float("nan"), 1e-42], dtype=dtype)
    return torch.where(torch.rand(shape) < 0.1, kinds[torch.randint(4, shape)], values)


def same(one: Tensor, other: Tensor) -> bool:
    bits = torch.int32 if one.dtype == torch.float32 else torch.int64
    return one.shape == other.shape and torch.equal(one.view(bits), other.view(bits))


def empty_tiles(d: int, width: int, dtype: torch.dtype) -> Tensor:
    rows = packed_layout.tile_count(d, width) * width
    return torch.full((rows, width), float("nan"), dtype=dtype)


def test_the_definition_reads_entries_where_they_lie() -> None:
    d, width = 11, 4
    matrix = torch.arange(float(d * d)).view(d, d)
    tiles = empty_tiles(d, width, torch.float32)
    reference.pack(matrix, tiles)
    for row in range(d):
        for column in range(d):
            panel = column // width
            if row // width <= panel:
                place = panel * (panel + 1) // 2 * width + row
                assert tiles[place, column % width] == matrix[row, column]
    assert tiles.count_nonzero() == sum(matrix[: (c // width + 1) * width, c].count_nonzero()
                                        for c in range(d))  # fmt: skip
    whole = torch.empty(d, d)
    reference.unpack(tiles, whole)
    assert torch.equal(whole, matrix.triu() + matrix.triu(1).T)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("d", [1, 7, 64, 65, 200, 1100])
def test_every_backend_gives_the_bits_of_the_definition(
    d: int, dtype: torch.dtype, backend: str
) -> None:
    for width in (1, 33, 64, 128, 512)[d > 200 :]:
        matrix = odd(d, d, dtype=dtype)
        tiles, whole = empty_tiles(d, width, dtype), torch.empty_like(matrix)
        reference.pack(matrix, tiles)
        reference.unpack(tiles, whole)
        with ops.use_backend(backend):
            packed = pack(matrix, width)
            assert same(packed.tiles, tiles)
            assert same(packed.dense(), whole)
            ops.mirror_(matrix)
            assert same(matrix, whole)
            packed.scale_(-0.3)
        reference.scale_(tiles, -0.3)
        assert same(packed.tiles, tiles)


@needs_native
@settings(max_examples=150, deadline=None)
@given(sizes, sizes, dtypes, st.integers(1, 5), st.integers(0, 2**32))
def test_any_size_on_any_number_of_threads_gives_the_bits_of_the_definition(
    d: int, width: int, dtype: torch.dtype, workers: int, seed: int
) -> None:
    torch.manual_seed(seed)
    matrix = odd(d, d, dtype=dtype)
    tiles, expected = (empty_tiles(d, width, dtype) for _ in range(2))
    reference.pack(matrix, expected)
    extension.pack(matrix, tiles, workers)
    assert same(tiles, expected)
    # What is below the diagonal and past d is never read.
    for start, stop, panel in packed_layout.panels(tiles, d):
        below = torch.ones(stop - start, stop - start, dtype=torch.bool).tril(-1)
        panel[start:].masked_fill_(below, float("nan"))
    whole, found = torch.empty_like(matrix), torch.full_like(matrix, float("nan"))
    reference.unpack(expected, whole)
    extension.unpack(tiles, found, workers)
    assert same(found, whole)
    extension.mirror_(matrix, workers)
    assert same(matrix, whole)
    scaled = expected.clone()
    extension.scale_(scaled, 1 / 3, workers)
    reference.scale_(expected, 1 / 3)
    assert same(scaled, expected)


def addresses(d: int = 5, width: int = 3) -> tuple[Tensor, Tensor]:
    return torch.zeros(d, d), empty_tiles(d, width, torch.float32).zero_()


def border(module: Any) -> dict[str, Callable[..., None]]:
    """Each operation with all its arguments right; keywords replace one."""
    matrix, tiles = addresses()
    last = "stream" if module.__name__.endswith("_cuda") else "workers"
    right = {
        "pack": {"matrix": matrix.data_ptr(), "d": 5, "tiles": tiles.data_ptr(),
                 "values": tiles.numel(), "width": 3, "bits": 32},
        "unpack": {"tiles": tiles.data_ptr(), "values": tiles.numel(), "width": 3,
                   "matrix": matrix.data_ptr(), "d": 5, "bits": 32},
        "mirror": {"matrix": matrix.data_ptr(), "values": 25, "d": 5, "bits": 32},
        "scale": {"values": tiles.data_ptr(), "size": tiles.numel(), "factor": 2.0, "bits": 32},
    }  # fmt: skip

    def bind(name: str) -> Callable[..., None]:
        # The tensors live as long as what holds their addresses.
        return lambda *_, keep=(matrix, tiles), **wrong: getattr(module, name)(
            **{**right[name], last: 1, **wrong}
        )

    return {name: bind(name) for name in right}


def modules() -> list[Any]:
    found = []
    for door, name in ((extension, "_C"), (extension_cuda, "_cuda")):
        missing = door.unavailable()
        mark = pytest.mark.skipif(missing is not None, reason=missing or "")
        found.append(pytest.param(getattr(door, name, None), id=name, marks=mark))
    return found


WRONG = [
    ("pack", {"matrix": 0}, "null"),
    ("pack", {"tiles": 0}, "null"),
    ("pack", {"tiles": 2}, "misaligned"),
    ("pack", {"d": 0}, "empty"),
    ("pack", {"width": -3}, "empty"),
    ("pack", {"values": 26}, "do not hold"),
    ("pack", {"values": 9}, "do not hold"),
    ("pack", {"d": 7}, "do not hold"),
    ("pack", {"d": 1 << 31}, "below"),
    ("pack", {"width": (1 << 31) - 1, "values": -1}, "do not hold"),
    ("pack", {"width": 1 << 62}, "below"),
    ("pack", {"bits": 16}, "32 or 64 bits"),
    ("unpack", {"matrix": 0}, "null"),
    ("unpack", {"tiles": 6}, "misaligned"),
    ("unpack", {"width": 2}, "do not hold"),
    ("unpack", {"d": -1}, "empty"),
    ("mirror", {"matrix": 0}, "null"),
    ("mirror", {"values": 24}, "do not hold"),
    ("mirror", {"d": 0}, "empty"),
    ("scale", {"values": 0}, "null"),
    ("scale", {"size": 0}, "empty"),
    ("scale", {"factor": float("nan")}, "finite"),
    ("scale", {"factor": 1e300}, "finite"),
    ("scale", {"bits": 33}, "32 or 64 bits"),
]


@pytest.mark.parametrize("module", modules())
@pytest.mark.parametrize(("name", "wrong", "message"), WRONG)
def test_wrong_addresses_and_sizes_are_refused(
    module: Any, name: str, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        border(module)[name](**wrong)


@needs_native
@settings(max_examples=300, deadline=None)
@given(st.integers(), st.integers(), st.integers(-(2**63), 2**63 - 1))
def test_sizes_that_contradict_each_other_never_reach_memory(
    d: int, width: int, values: int
) -> None:
    def belong() -> bool:
        return d > 0 and width > 0 and values == packed_layout.tile_count(d, width) * width**2

    for name in ("pack", "unpack"):
        if not belong():
            # TypeError: a number past 64 bits does not cross the border at all.
            with pytest.raises((ValueError, TypeError)):
                border(extension._C)[name](d=d, width=width, values=values)


@pytest.mark.skipif(
    extension_cuda.unavailable() is not None or torch.cuda.is_available(),
    reason="needs the CUDA extension on a machine without a GPU",
)
@pytest.mark.parametrize("name", ["pack", "unpack", "mirror", "scale"])
def test_without_a_driver_cuda_says_so_in_its_own_words(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"address lies: .*CUDA"):
        border(extension_cuda._cuda)[name]()


@needs_native
def test_the_cuda_door_passes_what_the_cpu_door_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both modules take the same arguments but the last, so one can stand in for the other."""

    def launch(function: Callable[..., None], tensor: Tensor, *arguments: float) -> None:
        function(*arguments, torch.finfo(tensor.dtype).bits, 1)

    monkeypatch.setattr(extension_cuda, "_cuda", extension._C, raising=False)
    monkeypatch.setattr(extension_cuda, "_launch", launch)
    matrix = torch.randn(70, 70, dtype=torch.float64)
    tiles, expected = (empty_tiles(70, 30, torch.float64) for _ in range(2))
    extension_cuda.pack(matrix, tiles)
    extension_cuda.scale_(tiles, 2.0)
    reference.pack(2 * matrix, expected)
    assert torch.equal(tiles, expected)
    found = torch.empty_like(matrix)
    extension_cuda.unpack(tiles, found)
    extension_cuda.mirror_(matrix)
    assert torch.equal(found, 2 * matrix)


@needs_native
def test_auto_takes_the_native_core_only_where_it_is_faster() -> None:
    matrix, tiles = addresses()
    arguments = {
        "pack": (matrix, tiles), "unpack": (tiles, matrix), "mirror_": (matrix,),
        "scale_": (tiles, 2.0),
    }  # fmt: skip
    chosen = {name: registry.resolve(name, *given) for name, given in arguments.items()}
    assert chosen == {
        "pack": packed_layout.pack, "unpack": packed_symmetric.unpack,
        "mirror_": packed_symmetric.mirror_, "scale_": packed_layout.scale_,
    }  # fmt: skip
    with ops.use_backend("native"):
        named = {name: registry.resolve(name, *given) for name, given in arguments.items()}
    assert named == {name: getattr(packed_symmetric, name) for name in arguments}


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.half(), "float16"),
        (lambda m: m.T, "rows"),
        (lambda m: m.requires_grad_(), "gradient"),
        (lambda m: m.to("meta"), "meta"),
    ],
)
def test_what_cannot_be_copied_by_address_is_left_to_torch(
    change: Callable[[Tensor], Tensor], message: str
) -> None:
    matrix = change(torch.randn(5, 5))
    with ops.use_backend("native"), pytest.raises(BackendUnavailable, match=message):
        pack(matrix, 3)
    found = pack(matrix, 3).dense()
    if not matrix.is_meta:
        assert torch.equal(found, matrix.triu() + matrix.triu(1).T)


def test_without_the_native_core_torch_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CURVFAST_NATIVE", "0")
    switched_off = extension.unavailable.__wrapped__()
    native = replace(registry._backends["native"], unavailable=lambda: switched_off)
    monkeypatch.setitem(registry._backends, "native", native)
    matrix, tiles = addresses()
    assert registry.resolve("unpack", tiles, matrix) is packed_layout.unpack
    with pytest.raises(BackendUnavailable, match="CURVFAST_NATIVE=0"):
        ops.use_backend("native").__enter__()


def test_on_cuda_the_native_core_must_be_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class OnCuda:
        requires_grad, dtype, device, is_cuda = False, torch.float32, torch.device("cuda:0"), True

        def is_contiguous(self) -> bool:
            return True

    monkeypatch.setattr(packed_symmetric, "Tensor", OnCuda)
    monkeypatch.setattr(registry, "_told", set())
    tensor = OnCuda()
    with caplog.at_level(logging.INFO, "curvfast"):
        assert registry.resolve("unpack", tensor, tensor) is packed_layout.unpack
    assert "no GPU has measured" in caplog.text
    monkeypatch.setattr(extension_cuda, "_reason", None)
    with ops.use_backend("native"):
        assert registry.resolve("unpack", tensor, tensor) is packed_symmetric.unpack
        monkeypatch.setattr(extension_cuda, "_reason", "the CUDA extension is not built (x)")
        with pytest.raises(BackendUnavailable, match="the CUDA extension is not built"):
            registry.resolve("unpack", tensor, tensor)


def test_compiled_code_sees_torchs_copies() -> None:
    sums = TriangularSum.zeros(40, 16)
    sums.tiles.copy_(torch.randn_like(sums.tiles))
    found = torch.compile(TriangularSum.dense, fullgraph=True, backend="aot_eager")(sums)
    assert torch.equal(found, sums.dense())


@pytest.mark.parametrize("matrix", [torch.zeros(2, 3), torch.zeros(4), torch.zeros(0, 0)])
def test_only_square_matrices_are_packed(matrix: Tensor) -> None:
    with pytest.raises(ShapeError):
        pack(matrix, 2)
    if matrix.numel():
        with pytest.raises(ShapeError, match="mirrored"):
            ops.mirror_(matrix)


def test_an_empty_matrix_is_its_own_mirror() -> None:
    ops.mirror_(torch.zeros(0, 0))
