"""The kernels on a GPU, through the same calls users make; without one, interpreted and small.

``benchmarks/device.sh B`` runs this file on a CUDA device. Elsewhere the same code is interpreted,
small, so that nothing here is first executed on a machine that costs money.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import llama, token_batches
from torch import Tensor

import curvfast
from curvfast import ops
from curvfast.collection.step import Asked, run_step
from curvfast.kfac.selection.staircase import staircase_by_mass
from curvfast.ops import MomentRequest, TriangularSum, reference, second_moment
from curvfast.ops.native import extension, extension_cuda

REAL = torch.cuda.is_available()
DEVICE = torch.device("cuda" if REAL else "cpu")
TILE = 128 if REAL else 32
WIDTHS = (64, 200, 768, 1000, 2048, 4096) if REAL else (24, 72)
ROWS = 3001 if REAL else 70
HALF = [torch.bfloat16, torch.float16]

pytestmark = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every operation here runs on the kernels or raises."""
    monkeypatch.setattr(second_moment, "tile_width", lambda d, device: TILE)
    with ops.use_backend("triton"):
        yield


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(-4, 5, shape).to(dtype).to(DEVICE)


def summed(x: Tensor, **options: Any) -> Tensor:
    out = TriangularSum.zeros(x.shape[-1], TILE, device=DEVICE)
    ops.second_moment_(out, x, **options)
    return out.dense().cpu().double()


def defined(x: Tensor, **options: Any) -> Tensor:
    out = TriangularSum.zeros(x.shape[-1], TILE, dtype=torch.float64)
    moved = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in options.items()}
    reference.second_moment_(MomentRequest(out, x.cpu(), **moved))
    return out.dense()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("d", WIDTHS)
def test_integer_moments_are_exact(d: int, dtype: torch.dtype) -> None:
    x = integers(ROWS, d, dtype=dtype)
    rows = torch.randperm(ROWS)[: ROWS // 3].to(DEVICE)
    weights = torch.randint(0, 3, (ROWS,)).float().square().to(DEVICE)
    for options in ({}, {"rows": rows}, {"weights": weights}, {"scale": 0.25}):
        assert torch.equal(summed(x, **options), defined(x, **options)), options


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_views_and_lengths_are_exact(dtype: torch.dtype) -> None:
    d = WIDTHS[1]
    x = integers(5, 33, d, dtype=dtype)
    lengths = torch.tensor([33, 0, 7, 32, 1], dtype=torch.int32, device=DEVICE)
    assert torch.equal(summed(x[:, :-1]), defined(x[:, :-1]))
    assert torch.equal(summed(x, lengths=lengths), defined(x, lengths=lengths))
    wide = integers(70, 2 * d, dtype=dtype)
    assert torch.equal(summed(wide[:, ::2]), defined(wide[:, ::2]))
    assert torch.equal(summed(wide[1:, 1 : d + 1]), defined(wide[1:, 1 : d + 1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_sums_are_exact(dtype: torch.dtype) -> None:
    x = integers(ROWS, WIDTHS[1], dtype=dtype)
    weights = torch.randint(0, 3, (ROWS,)).float().square().to(DEVICE)
    out, also = (TriangularSum.zeros(WIDTHS[1], TILE, device=DEVICE) for _ in range(2))
    ops.second_moment_(out, x, also=also, also_weights=weights)
    assert torch.equal(out.dense().cpu().double(), defined(x))
    assert torch.equal(also.dense().cpu().double(), defined(x, weights=weights))


def test_grouped_sums_are_exact() -> None:
    inputs = [integers(50 + 8 * i, d, dtype=torch.bfloat16) for i, d in enumerate(WIDTHS)]
    sums = [TriangularSum.zeros(x.shape[1], TILE, device=DEVICE) for x in inputs]
    ops.second_moments_([MomentRequest(s, x) for s, x in zip(sums, inputs, strict=True)])
    for out, x in zip(sums, inputs, strict=True):
        assert torch.equal(out.dense().cpu().double(), defined(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", WIDTHS[-2:])
def test_the_error_is_near_torchs_own_and_repeats(d: int, dtype: torch.dtype) -> None:
    x = (torch.randn(ROWS, d) * torch.logspace(0, -3, d)).to(dtype).to(DEVICE)
    exact = defined(x)
    found = summed(x)
    torchs = (x.float().T @ x.float()).cpu().double()
    rounding = 2**-15 if dtype == torch.float32 else 1e-7
    bound = 2 * (torchs - exact).norm() + rounding * exact.norm()
    assert (found - exact).norm() <= bound
    assert torch.equal(found, summed(x))


def test_projections_are_exact_enough() -> None:
    rows, columns = (1000, 1500) if REAL else (60, 75)
    left, right = (torch.linalg.qr(torch.randn(d, d))[0].to(DEVICE) for d in (rows, columns))
    weight = torch.randn(rows, columns, device=DEVICE)
    g, a = (1 / torch.arange(1, d + 1, dtype=torch.float64) for d in (rows, columns))
    for mass in (0.5, 0.8, 0.95, 0.999):
        widths = staircase_by_mass(g, a, mass).widths
        exact = [t.cpu().double() for t in (weight, left, right)]
        kept = torch.arange(columns) < widths[:, None]
        expected = exact[1] @ (kept * (exact[1].T @ exact[0] @ exact[2])) @ exact[2].T
        found = ops.project(weight, left, right, widths).cpu()
        assert (found - expected).norm() <= 2e-5 * expected.norm()
        rest = ops.project(weight, left, right, widths, residual=True).cpu()
        assert (found + rest - exact[0]).norm() <= 2e-5 * exact[0].norm()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_band_energies_of_integers_are_exact(dtype: torch.dtype) -> None:
    d = WIDTHS[1]
    x = integers(ROWS, d, dtype=dtype)
    vectors = torch.randint(-1, 2, (d, d)).float().to(DEVICE)
    edges = [0, d // 3, d // 3 + 1, d]
    expected = reference.band_energies(x.cpu(), vectors.cpu(), edges)
    assert torch.equal(ops.band_energies(x, vectors, edges).cpu().double(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_sampled_gradients_are_of_their_labels(dtype: torch.dtype) -> None:
    classes = 50257 if REAL else 500
    logits = (2 * torch.randn(40, classes)).to(dtype)
    values = logits.to(DEVICE, copy=True)
    labels = ops.sampled_gradient_(values, None, torch.Generator(DEVICE).manual_seed(3)).cpu()
    expected = reference.nll_gradient(logits, labels)
    assert (values.cpu().double() - expected).abs().max() <= 4 * torch.finfo(dtype).eps
    again = ops.sampled_gradient_(
        logits.to(DEVICE, copy=True), None, torch.Generator(DEVICE).manual_seed(3)
    )
    assert torch.equal(again.cpu(), labels)


def test_collecting_and_editing_use_the_kernels_unasked() -> None:
    model, batches = llama(), token_batches()
    with ops.use_backend("torch"):
        twin = copy.deepcopy(model)
        expected = curvfast.collect_from(twin, batches, labels="gold", progress=False)
        basis = expected.eigh()
        curvfast.edit(twin, basis, mass=0.8)
    with ops.use_backend("auto" if REAL else "triton"):
        model.to(DEVICE)
        factors = curvfast.collect_from(model, batches, labels="gold", progress=False)
        assert factors.rows == expected.rows
        for name, layer in expected.items():
            for found, exact in ((factors[name].A, layer.A), (factors[name].G, layer.G)):
                assert (found.cpu() - exact).norm() <= 1e-4 * exact.norm(), name
        curvfast.edit(model, basis, mass=0.8)
    for (name, found), exact in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (found.cpu() - exact).norm() <= 1e-4 * exact.norm(), name


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("branches", ["cpu", "accelerator"], indirect=True)
def test_sampled_labels_are_as_many_and_as_large_as_a_cpus(padding: str, branches: str) -> None:
    """Short sequences: one position too many a sequence would show in the count, and in G."""
    model = llama(num_hidden_layers=1)
    batches = [
        {key: rows.repeat(8 if REAL else 1, 1) for key, rows in batch.items()}
        for batch in token_batches(padding, sizes=(4, 8) if REAL else (8,))
    ]
    masks = [b.get("attention_mask", torch.ones_like(b["input_ids"])) for b in batches]
    labels = sum(int(mask.sum()) - len(mask) for mask in masks)

    def traces(seed: int) -> dict[str, float]:
        found = curvfast.collect_from(
            model, batches, "mlp", labels="sampled", seed=seed, progress=False
        )
        assert found.rows == labels
        return {name: float(layer.G.trace()) for name, layer in found.items()}

    with ops.use_backend("torch"):
        draws = [traces(seed) for seed in range(12)]
    model.to(DEVICE)
    with ops.use_backend("auto" if REAL else "triton"):
        generator = torch.Generator(DEVICE).manual_seed(5)
        for batch, mask in zip(batches, masks, strict=True):
            drawn = run_step(model, batch, Asked("sampled", causal=True), generator)
            assert drawn == int(mask.sum()) - len(mask)
        found = [traces(seed) for seed in range(100, 103 if REAL else 101)]
    for name in draws[0]:
        one, other = (torch.tensor([draw[name] for draw in each]) for each in (found, draws))
        spread = other.std() * (1 / len(one) + 1 / len(other)) ** 0.5
        assert abs(one.mean() - other.mean()) <= 5 * spread, name


def test_training_on_padded_batches_uses_the_kernels() -> None:
    model, batches = llama(), token_batches("right")
    with ops.use_backend("torch"), curvfast.collect(model, "all") as curvature:
        for batch in batches:
            model(**batch).loss.backward()
    expected = curvature.factors()
    model.to(DEVICE)
    with ops.use_backend("auto" if REAL else "triton"), curvfast.collect(model, "all") as curvature:
        for batch in batches:
            model(**{k: v.to(DEVICE) for k, v in batch.items()}).loss.backward()
        found = curvature.factors()
    for name, layer in expected.items():
        assert found[name].rows_g == layer.rows_g
        assert (found[name].A.cpu() - layer.A).norm() <= 1e-4 * layer.A.norm()
        assert (found[name].G.cpu() - layer.G).norm() <= 1e-4 * layer.G.norm()


@pytest.mark.parametrize("padding", ["none", "right"])
def test_weighted_moments_and_corrections_are_those_of_a_cpu(padding: str) -> None:
    model = llama(num_hidden_layers=1)
    batches = token_batches(padding)
    options: dict[str, Any] = {"labels": "gold", "progress": False}
    with ops.use_backend("torch"):
        expected = curvfast.collect_from(model, batches, marginals=True, **options)
        basis = expected.eigh()
        exact = [
            curvfast.correct(model, basis, batches, per=per, **options)
            for per in ("position", "sequence")
        ]
    model.to(DEVICE)
    streams = "overlap" if REAL else "one"
    found = curvfast.collect_from(model, batches, marginals=True, streams=streams, **options)
    for name, layer in expected.items():
        for side in ("a_weighted", "g_weighted"):
            one, two = getattr(found[name], side).cpu(), getattr(layer, side)
            assert (one - two).norm() <= 1e-4 * two.norm()
    for each in exact:
        again = curvfast.correct(model, basis, batches, per=each.per, **options)
        for name in each:
            assert again.layers[name].count == each.layers[name].count
            assert (again[name].cpu() - each[name]).norm() <= 1e-4 * each[name].norm()


CORE = (extension_cuda if REAL else extension).unavailable()
needs_core = pytest.mark.skipif(CORE is not None, reason=CORE or "")


@contextmanager
def another_stream() -> Iterator[None]:
    """Run the block on a stream that is not the default, where there are streams."""
    if not REAL:
        yield
        return
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        yield
    torch.cuda.synchronize()


@needs_core
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [1, 31, 33, *WIDTHS])
def test_the_native_core_copies_bit_for_bit(d: int, dtype: torch.dtype) -> None:
    for width in (1, 100, TILE, d)[d > 1000 :]:
        matrix = torch.randn(d, d, dtype=dtype, device=DEVICE)
        found = []
        for backend in ("torch", "native"):
            mirrored = matrix.clone()
            with ops.use_backend(backend), another_stream():
                packed = ops.pack(matrix, width)
                whole = packed.dense()
                ops.mirror_(mirrored)
                packed.scale_(1 / 3)
            found.append((packed.tiles, whole, mirrored))
        for expected, ours in zip(*found, strict=True):
            assert torch.equal(expected, ours), width


@needs_core
def test_the_native_core_counts_entries_past_two_to_the_31() -> None:
    if REAL and torch.cuda.mem_get_info()[0] < 26e9:
        pytest.skip("needs 26 GB of GPU memory")
    d = 47_000 if REAL else 70
    packed = TriangularSum.zeros(d, TILE, device=DEVICE)
    packed.tiles[-TILE:] = 1.0
    with ops.use_backend("native"):
        whole = packed.dense()
    last = d - (d - 1) // TILE * TILE
    assert (whole[-last:, -last:] == 1).all()
    assert whole.count_nonzero() == last**2


@pytest.mark.skipif(not REAL, reason="needs a GPU")
@needs_core
def test_the_native_core_refuses_memory_of_the_host() -> None:
    host = torch.zeros(9, 9)
    with pytest.raises(ValueError, match="not of a CUDA device's memory"):
        extension_cuda._cuda.mirror(host.data_ptr(), 81, 9, 32, 0)


@pytest.mark.skipif(not REAL, reason="needs 9 GB of GPU memory")
def test_offsets_past_two_to_the_31_are_right() -> None:
    d, rows = 4096, 600_000
    x = torch.zeros(rows, d, dtype=torch.bfloat16, device=DEVICE)
    x[-1, :3] = torch.tensor([1.0, 2.0, 3.0])
    for options in ({}, {"rows": torch.tensor([0, rows - 1], device=DEVICE)}):
        out = TriangularSum.zeros(d, TILE, device=DEVICE)
        ops.second_moment_(out, x, **options)
        found = out.dense()
        expected = torch.tensor([[1.0, 2, 3], [2, 4, 6], [3, 6, 9]], device=DEVICE)
        assert torch.equal(found[:3, :3], expected)
        assert found.count_nonzero() == 9
