"""What is measured on a GPU; each case checks its result before it times it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_timing import DEVICE, REAL, gemm_ceiling, medians, with_tf32, without_tf32
from torch import Tensor

import curvfast
from curvfast import ops
from curvfast.core.staircase import staircase_by_mass
from curvfast.errors import BackendUnavailable
from curvfast.ops import TriangularSum
from curvfast.ops.projection import dense_flops, plan

Row = dict[str, Any]
TILE = 128 if REAL else 32
ROWS = 16384 if REAL else 96
WIDTHS = (768, 1024, 2048, 3072, 4096, 8192, 11008, 14336) if REAL else (40,)
PANEL = 1024


def second_moment() -> Iterator[Row]:
    """One batch into one sum, against every way cuBLAS can be asked for it."""
    ceiling = gemm_ceiling()
    for dtype in (torch.bfloat16, torch.float32):
        for d in WIDTHS:
            x = torch.randn(ROWS, d, device=DEVICE).to(dtype)
            out = TriangularSum.zeros(d, TILE, device=DEVICE)
            ops.second_moment_(out, x)
            error = _gram_error(out.dense(), x)
            assert error < 1e-4, (d, dtype, error)
            peers = _cublas(x)
            found = medians({"ours": lambda out=out, x=x: ops.second_moment_(out, x), **peers})
            ours = found.pop("ours")
            rate = 2 * ROWS * d * d / ours / 1e9
            yield {
                "dtype": str(dtype).removeprefix("torch."), "rows": ROWS, "d": d, "ms": ours,
                "tflops_dense_equivalent": rate,
                "ratio_best_cublas": min(found.values()) / ours,
                "fraction_of_gemm_ceiling": rate / ceiling, "error": error, "peers_ms": found,
                "gemm_ceiling_tflops": ceiling,
            }  # fmt: skip


def masked_second_moment() -> Iterator[Row]:
    """The price of choosing and weighing rows."""
    d = 4096 if REAL else 40
    x = torch.randn(ROWS, d, device=DEVICE).bfloat16()
    rows = torch.randperm(ROWS, device=DEVICE)[: 3 * ROWS // 4].sort().values
    weights = torch.rand(ROWS, device=DEVICE)
    out, also = (TriangularSum.zeros(d, TILE, device=DEVICE) for _ in range(2))
    yield {
        "d": d, "rows": ROWS,
        "ms": medians({
            "whole": lambda: ops.second_moment_(out, x),
            "three quarters chosen": lambda: ops.second_moment_(out, x, rows=rows),
            "weighted": lambda: ops.second_moment_(out, x, weights=weights),
            "two sums": lambda: ops.second_moment_(out, x, also=also, also_weights=weights),
        }),
    }  # fmt: skip


def grouped_second_moments() -> Iterator[Row]:
    """Many small sums in one launch, against a loop of cuBLAS calls."""
    for d in (768, 1024) if REAL else (32,):
        inputs = [torch.randn(4096 if REAL else 64, d, device=DEVICE).bfloat16() for _ in range(32)]
        sums = [TriangularSum.zeros(d, TILE, device=DEVICE) for _ in inputs]
        dense = [torch.zeros(d, d, device=DEVICE) for _ in inputs]
        requests = [ops.MomentRequest(s, x) for s, x in zip(sums, inputs, strict=True)]

        def loop(inputs: Any = inputs, dense: Any = dense) -> None:
            for out, x in zip(dense, inputs, strict=True):
                _mm(out, x.T, x)

        found = medians({"ours": lambda r=requests: ops.second_moments_(r), "cublas": loop})
        yield {"layers": 32, "d": d, **found, "ratio": found["cublas"] / found["ours"]}


def packed_sum() -> Iterator[Row]:
    """A sum read as a whole matrix: the native core's copies against torch's."""
    for d in (768, 4096, 14336) if REAL else (40,):
        packed = ops.pack(torch.randn(d, d, device=DEVICE), TILE)

        def dense(backend: str, packed: TriangularSum = packed) -> Tensor:
            with ops.use_backend(backend):
                return packed.dense()

        try:
            assert torch.equal(dense("native"), dense("torch"))
        except BackendUnavailable as error:
            yield {"d": d, "torch": None, "native": str(error)}
            continue
        times = medians({b: lambda b=b, f=dense: f(b) for b in ("native", "torch")})
        moved = (packed.tiles.numel() + d * d) * packed.tiles.element_size()
        yield {
            "d": d, **times, "ratio": times["torch"] / times["native"],
            "gigabytes_a_second": moved / times["native"] / 1e6,
        }  # fmt: skip


def projection() -> Iterator[Row]:
    """Projections onto staircases, against four dense products of the same precision."""
    for rows, columns in ((4096, 4096), (4096, 11008)) if REAL else ((70, 90),):
        weight = torch.randn(rows, columns, device=DEVICE)
        left, right = (
            torch.linalg.qr(torch.randn(d, d, device=DEVICE))[0] for d in (rows, columns)
        )
        g, a = (1 / torch.arange(1, d + 1, dtype=torch.float64) for d in (rows, columns))
        for mass in (0.6, 0.8, 0.9, 0.95) if REAL else (0.8,):
            widths = staircase_by_mass(g, a, mass).widths
            kept = torch.arange(columns, device=DEVICE) < widths.to(DEVICE)[:, None]

            def dense(w: Any = weight, u: Any = left, v: Any = right, m: Any = kept) -> Tensor:
                return u @ (m * (u.T @ w @ v)) @ v.T

            exact = dense(weight.double(), left.double(), right.double())
            found = ops.project(weight, left, right, widths)
            error = float((found - exact).norm() / exact.norm())
            assert error < 2e-5, error
            times = medians({
                "ours": lambda w=widths, x=weight, u=left, v=right: ops.project(x, u, v, w),
                "dense_fp32": without_tf32(dense),
                "dense_tf32": with_tf32(dense),
            })  # fmt: skip
            chosen = plan(widths.numpy(), columns)
            yield {
                "rows": rows, "columns": columns, "mass": mass, **times, "error": error,
                "flops": chosen.flops, "share_of_dense": chosen.flops / dense_flops(rows, columns),
                "ratio": times["dense_fp32"] / times["ours"],
            }  # fmt: skip


def band_energies() -> Iterator[Row]:
    """Energies of two bands, against projecting in memory."""
    for d in (2048, 4096) if REAL else (40,):
        x = torch.randn(ROWS, d, device=DEVICE).bfloat16()
        vectors = torch.linalg.qr(torch.randn(d, d, device=DEVICE))[0].bfloat16()
        edges = [0, d // 2, d]

        def plain(x: Any = x, v: Any = vectors, e: Any = edges) -> Tensor:
            energy = (x @ v).float().square()
            return torch.stack([energy[:, : e[1]].sum(1), energy[:, e[1] :].sum(1)], 1)

        found = ops.band_energies(x, vectors, edges)
        total = x.float().square().sum(1)
        assert float(((found.sum(1) - total).abs() / total).max()) < 0.05
        times = medians(
            {"ours": lambda x=x, v=vectors, e=edges: ops.band_energies(x, v, e), "plain": plain}
        )
        yield {"rows": ROWS, "d": d, **times, "ratio": times["plain"] / times["ours"]}


def sampled_gradient() -> Iterator[Row]:
    """Sampled gradients, against softmax, multinomial and scatter in float32."""
    for classes in (32000, 128256, 256000) if REAL else (300,):
        logits = torch.randn(2048 if REAL else 8, classes, device=DEVICE).bfloat16()
        generator = torch.Generator(DEVICE).manual_seed(0)

        def ours(x: Any = logits, g: Any = generator) -> None:
            ops.sampled_gradient_(x, None, g)

        def plain(x: Any = logits, g: Any = generator) -> None:
            probabilities = x.float().softmax(-1)
            labels = torch.multinomial(probabilities, 1, generator=g)
            probabilities.scatter_add_(1, labels, -torch.ones_like(probabilities[:, :1]))

        times = medians({"plain": plain, "ours": ours}, rounds=7)
        read_and_written = 3 * logits.numel() * 2
        yield {
            "rows": logits.shape[0], "classes": classes, **times,
            "ratio": times["plain"] / times["ours"],
            "gigabytes_a_second": read_and_written / times["ours"] / 1e6,
        }  # fmt: skip


def eigh() -> Iterator[Row]:
    """torch's own eigendecompositions: what dominates a run."""
    libraries = ("default", "cusolver", "magma") if REAL else ("default",)
    for d in (4096, 8192, 11008, 14336) if REAL else (32,):
        x = torch.randn(d, d, device=DEVICE)
        matrix = x @ x.T / d
        for dtype in (torch.float32, torch.float64):
            for library in libraries:
                if REAL:
                    torch.backends.cuda.preferred_linalg_library(library)
                try:
                    found = medians({"eigh": lambda m=matrix, t=dtype: _eigh(m, t)}, rounds=1)
                except RuntimeError as error:
                    yield {"d": d, "dtype": str(dtype), "library": library, "error": str(error)}
                    continue
                yield {"d": d, "dtype": str(dtype), "library": library, "ms": found["eigh"]}


def collect_overhead() -> Iterator[Row]:
    """A training step with and without collect(), and collect_from()."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, mlp, length = (2048, 8192, 1024) if REAL else (32, 64, 16)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=4, num_attention_heads=8,
        vocab_size=32000 if REAL else 100, max_position_embeddings=length,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(DEVICE, torch.bfloat16)
    tokens = torch.randint(config.vocab_size, (8, length), device=DEVICE)

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        model.zero_grad()

    plain = medians({"step": step}, rounds=5)["step"]
    with curvfast.collect(model) as curvature:
        collecting = medians({"step": step}, rounds=5)["step"]
        assert curvature.factors().rows > 0
    driven = medians(
        {"driven": lambda: curvfast.collect_from(model, [tokens], progress=False)}, rounds=3
    )["driven"]
    yield {
        "hidden": hidden, "mlp": mlp, "tokens": tokens.numel(), "step_ms": plain,
        "collecting_step_ms": collecting, "ratio": collecting / plain,
        "collect_from_ms": driven, "tokens_a_second": 1e3 * tokens.numel() / driven,
    }  # fmt: skip


CASES: dict[str, Callable[[], Iterator[Row]]] = {
    case.__name__: case
    for case in (
        second_moment, masked_second_moment, grouped_second_moments, packed_sum, projection,
        band_energies, sampled_gradient, collect_overhead, eigh,
    )
}  # fmt: skip


def _cublas(x: Tensor) -> dict[str, Callable[[], Any]]:
    d = x.shape[1]
    out = torch.zeros(d, d, device=DEVICE)

    def addmm() -> Any:
        rows = x.float()
        return out.addmm_(rows.T, rows)

    peers = {"addmm_fp32": without_tf32(addmm), "addmm_tf32": with_tf32(addmm)}
    if x.dtype == torch.bfloat16:
        peers["mm_out_dtype"] = lambda: _mm(out, x.T, x)
        peers["blocked_triangle"] = lambda: [
            _mm(out[: s + PANEL, s : s + PANEL], x[:, : s + PANEL].T, x[:, s : s + PANEL])
            for s in range(0, d, PANEL)
        ]
    return peers


def _mm(out: Tensor, a: Tensor, b: Tensor) -> None:
    # Products of 16-bit matrices with a float32 result exist on CUDA alone.
    out.add_(torch.mm(a, b, out_dtype=torch.float32) if REAL else a.float() @ b.float())


def _gram_error(found: Tensor, x: Tensor) -> float:
    some = torch.randperm(x.shape[1], device=x.device)[:256]
    exact = x[:, some].double().T @ x.double()
    return float((found[some] - exact).norm() / exact.norm())


def _eigh(matrix: Tensor, dtype: torch.dtype) -> Any:
    return torch.linalg.eigh(matrix.to(dtype))
