"""What is measured on a GPU; each case checks its result before it times it.

A case takes its sizes as words, and yields rows. Most are races: calls of ours against the ways
torch can be asked for the same, which warming up compiles without running.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_timing import (
    DEVICE,
    REAL,
    Timing,
    copy_ceiling,
    gemm_ceiling,
    timings,
    with_tf32,
    without_tf32,
)
from torch import Tensor

import curvfast
from curvfast import ops
from curvfast.kfac.selection.staircase import staircase_by_mass
from curvfast.ops import TriangularSum
from curvfast.ops.projection import dense_flops, plan

Row = dict[str, Any]
Call = Callable[[], Any]
TILE = 128 if REAL else 32
PANEL = 1024


@dataclass(frozen=True)
class Race:
    """Ours against others, on one set of data."""

    ours: Mapping[str, Call]
    """The first is what the others are held against."""
    peers: Mapping[str, Call]
    check: Callable[[], float]
    """Returns the error of the first of ours, having asserted its bound."""
    row: Callable[[Mapping[str, Timing]], Row]
    """The figures a reader asks for, from the times."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 15


def raced(race: Race) -> Row:
    """Check, time and tell a race; a peer that cannot run is told instead of timed."""
    error = race.check()
    peers, absent = {}, {}
    for name, call in race.peers.items():
        try:
            call()
            peers[name] = call
        except (AttributeError, NotImplementedError, RuntimeError, TypeError) as refusal:
            absent[name] = f"{type(refusal).__name__}: {refusal}"[:300]
    if REAL:
        torch.cuda.synchronize()
    times = timings({**race.ours, **peers}, race.rounds)
    first = times[next(iter(race.ours))]
    return {
        **race.facts, "error": error, **race.row(times), "host_us": first.host_us,
        "spread": first.spread, "host_hidden": all(t.host_hidden for t in times.values()),
        "times_ms": {name: t.ms for name, t in times.items()}, "absent": absent,
    }  # fmt: skip


def second_moment(dtype: str, rows: str, d: str) -> Race:
    """One batch into one sum, against every way cuBLAS can be asked for it."""
    x = torch.randn(int(rows), int(d), device=DEVICE).to(getattr(torch, dtype))
    out = TriangularSum.zeros(int(d), TILE, device=DEVICE)

    def check() -> float:
        ops.second_moment_(out, x)
        return _below(_gram_error(out.dense(), x), 1e-4)

    def row(times: Mapping[str, Timing]) -> Row:
        ours = times["ours"].ms
        rate = 2 * x.shape[0] * x.shape[1] ** 2 / ours / 1e9
        fraction = rate / gemm_ceiling()
        # Half the products of a dense update: more than twice its rate is a measurement gone wrong.
        assert not REAL or fraction <= 2, fraction
        return {
            "ms": ours, "tflops_dense_equivalent": rate, "fraction_of_gemm_ceiling": fraction,
            "ratio_best_cublas": min(t.ms for n, t in times.items() if n != "ours") / ours,
            "gemm_ceiling_tflops": gemm_ceiling(),
        }  # fmt: skip

    facts = {"dtype": dtype, "rows": x.shape[0], "d": x.shape[1]}
    return Race({"ours": lambda: ops.second_moment_(out, x)}, _cublas(x), check, row, facts)


def masked_second_moment(rows: str, d: str) -> Race:
    """The price of choosing and weighing rows, and of a mask that chooses all."""
    count = int(rows)
    x = torch.randn(count, int(d), device=DEVICE).bfloat16()
    chosen = torch.randperm(count, device=DEVICE)[: 7 * count // 10].sort().values
    every = torch.arange(count, device=DEVICE)
    weights = torch.rand(count, device=DEVICE)
    out, also = (TriangularSum.zeros(int(d), TILE, device=DEVICE) for _ in range(2))

    def check() -> float:
        ops.second_moment_(out, x, rows=chosen)
        return _below(_gram_error(out.dense(), x[chosen]), 1e-4)

    def row(times: Mapping[str, Timing]) -> Row:
        return {"ms": {name: t.ms for name, t in times.items()}}

    ours = {
        "whole": lambda: ops.second_moment_(out, x),
        "seven tenths chosen": lambda: ops.second_moment_(out, x, rows=chosen),
        "all chosen": lambda: ops.second_moment_(out, x, rows=every),
        "weighted": lambda: ops.second_moment_(out, x, weights=weights),
        "two sums": lambda: ops.second_moment_(out, x, also=also, also_weights=weights),
    }
    return Race(ours, {}, check, row, {"rows": count, "d": int(d)})


def grouped_second_moments(layers: str, rows: str, d: str) -> Race:
    """Many small sums in one launch, against a loop of cuBLAS calls."""
    inputs = [torch.randn(int(rows), int(d), device=DEVICE).bfloat16() for _ in range(int(layers))]
    sums = [TriangularSum.zeros(int(d), TILE, device=DEVICE) for _ in inputs]
    dense = [torch.zeros(int(d), int(d), device=DEVICE) for _ in inputs]
    requests = [ops.MomentRequest(s, x) for s, x in zip(sums, inputs, strict=True)]

    def loop() -> None:
        for out, x in zip(dense, inputs, strict=True):
            _mm(out, x.T, x)

    def check() -> float:
        ops.second_moments_(requests)
        errors = [_gram_error(s.dense(), x) for s, x in zip(sums, inputs, strict=True)]
        return _below(max(errors), 1e-4)

    facts = {"layers": int(layers), "rows": int(rows), "d": int(d)}
    ours = {"ours": lambda: ops.second_moments_(requests)}
    return Race(ours, {"cublas": loop}, check, _ratio("cublas"), facts)


def packed_sum(d: str) -> Race:
    """A sum read as a whole matrix: the native core's copies against torch's."""
    packed = ops.pack(torch.randn(int(d), int(d), device=DEVICE), TILE)

    def dense(backend: str) -> Tensor:
        with ops.use_backend(backend):
            return packed.dense()

    def check() -> float:
        assert torch.equal(dense("native"), dense("torch"))
        return 0.0

    def row(times: Mapping[str, Timing]) -> Row:
        moved = (packed.tiles.numel() + int(d) ** 2) * packed.tiles.element_size()
        return {
            **_ratio("torch", "native")(times),
            "gigabytes_a_second": moved / times["native"].ms / 1e6,
        }

    calls = {backend: lambda b=backend: dense(b) for backend in ("native", "torch")}
    return Race({"native": calls["native"]}, {"torch": calls["torch"]}, check, row, {"d": int(d)})


def projection(rows: str, columns: str, mass: str) -> Race:
    """Projections onto staircases, against four dense products of the same precision."""
    sides = int(rows), int(columns)
    weight = torch.randn(sides, device=DEVICE)
    left, right = (torch.linalg.qr(torch.randn(d, d, device=DEVICE))[0] for d in sides)
    g, a = (1 / torch.arange(1, d + 1, dtype=torch.float64) for d in sides)
    widths = staircase_by_mass(g, a, float(mass)).widths
    kept = torch.arange(sides[1], device=DEVICE) < widths.to(DEVICE)[:, None]

    def dense(w: Tensor = weight, u: Tensor = left, v: Tensor = right) -> Tensor:
        return u @ (kept * (u.T @ w @ v)) @ v.T

    def ours() -> Tensor:
        return ops.project(weight, left, right, widths)

    def check() -> float:
        exact = dense(weight.double(), left.double(), right.double())
        return _below(float((ours() - exact).norm() / exact.norm()), 2e-5)

    def row(times: Mapping[str, Timing]) -> Row:
        chosen = plan(widths.numpy(), sides[1])
        return {
            **_ratio("dense_fp32")(times), "dense_tf32": times["dense_tf32"].ms,
            "flops": chosen.flops, "share_of_dense": chosen.flops / dense_flops(*sides),
        }  # fmt: skip

    peers = {"dense_fp32": without_tf32(dense), "dense_tf32": with_tf32(dense)}
    facts = {"rows": sides[0], "columns": sides[1], "mass": float(mass)}
    return Race({"ours": ours}, peers, check, row, facts)


def band_energies(rows: str, d: str) -> Race:
    """Energies of two bands, against projecting in memory."""
    x = torch.randn(int(rows), int(d), device=DEVICE).bfloat16()
    vectors = torch.linalg.qr(torch.randn(int(d), int(d), device=DEVICE))[0].bfloat16()
    edges = [0, int(d) // 2, int(d)]

    def plain() -> Tensor:
        energy = (x @ vectors).float().square()
        return torch.stack([energy[:, : edges[1]].sum(1), energy[:, edges[1] :].sum(1)], 1)

    def ours() -> Tensor:
        return ops.band_energies(x, vectors, edges)

    def check() -> float:
        energy = (x.double() @ vectors.double()).square()
        exact = torch.stack([energy[:, : edges[1]].sum(1), energy[:, edges[1] :].sum(1)], 1)
        return _below(float(((ours() - exact).abs() / exact).max()), 1e-3)

    facts = {"rows": int(rows), "d": int(d)}
    return Race({"ours": ours}, {"plain": plain}, check, _ratio("plain"), facts)


def sampled_gradient(rows: str, classes: str) -> Race:
    """Sampled gradients, against softmax, multinomial and scatter in float32."""
    logits = torch.randn(int(rows), int(classes), device=DEVICE).bfloat16()
    generator = torch.Generator(DEVICE).manual_seed(0)

    def ours() -> Tensor:
        return ops.sampled_gradient_(logits, None, generator)

    def plain() -> None:
        probabilities = logits.float().softmax(-1)
        labels = torch.multinomial(probabilities, 1, generator=generator)
        probabilities.scatter_add_(1, labels, -torch.ones_like(probabilities[:, :1]))

    def check() -> float:
        exact = logits.double().softmax(-1)
        labels = ours()
        exact[torch.arange(len(labels), device=DEVICE), labels] -= 1
        return _below(float((logits.double() - exact).abs().max()), 1e-2)

    def row(times: Mapping[str, Timing]) -> Row:
        read_and_written = 3 * logits.numel() * 2
        rate = read_and_written / times["ours"].ms / 1e6
        return {**_ratio("plain")(times), "gigabytes_a_second": rate}

    facts = {"rows": int(rows), "classes": int(classes)}
    return Race({"ours": ours}, {"plain": plain}, check, row, facts, rounds=7)


def ceilings() -> Iterator[Row]:
    """What this device gives: a copy in its memory, and a large product."""
    yield {"copy_gigabytes_a_second": copy_ceiling(), "gemm_tflops": gemm_ceiling()}


def eigh(d: str, dtype: str, library: str) -> Iterator[Row]:
    """torch's own eigendecompositions: what dominates a run."""
    x = torch.randn(int(d), int(d), device=DEVICE)
    matrix = (x @ x.T / int(d)).to(getattr(torch, dtype))
    if REAL:
        torch.backends.cuda.preferred_linalg_library(library)
    found = timings({"eigh": lambda: torch.linalg.eigh(matrix)}, 1, waits=True)["eigh"]
    yield {"d": int(d), "dtype": dtype, "library": library, "ms": found.ms}


def end_to_end(hidden: str, mlp: str, layers: str, length: str) -> Iterator[Row]:
    """A training step with and without collect(), and collect_from()."""
    model, tokens, step = training(hidden, mlp, layers, length)
    plain = timings({"step": step}, 5, waits=True)["step"].ms
    with curvfast.collect(model, "all") as curvature:
        collecting = timings({"step": step}, 5, waits=True)["step"].ms
        assert curvature.factors().rows > 0
    facts = {"hidden": int(hidden), "mlp": int(mlp), "layers": int(layers)}
    yield {
        **facts, "tokens": tokens.numel(), "step_ms": plain, "collecting_step_ms": collecting,
        "ratio": collecting / plain,
        "peak_bytes": torch.cuda.max_memory_allocated() if REAL else None,
    }  # fmt: skip

    def drive() -> None:
        curvfast.collect_from(model, [tokens], progress=False)

    driven = timings({"driven": drive}, 3, waits=True)["driven"].ms
    yield {**facts, "collect_from_ms": driven, "tokens_a_second": 1e3 * tokens.numel() / driven}


def training(hidden: str, mlp: str, layers: str, length: str) -> tuple[Any, Tensor, Call]:
    """Return a Llama of some width, tokens, and a step of its training."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=int(hidden), intermediate_size=int(mlp), num_hidden_layers=int(layers),
        num_attention_heads=max(2, int(hidden) // 128), vocab_size=32000 if REAL else 100,
        num_key_value_heads=max(1, int(hidden) // 512), max_position_embeddings=int(length),
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(DEVICE, torch.bfloat16)
    tokens = torch.randint(config.vocab_size, (8, int(length)), device=DEVICE)

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        model.zero_grad()

    return model, tokens, step


RACES: dict[str, Callable[..., Race]] = {
    race.__name__: race
    for race in (
        second_moment, masked_second_moment, grouped_second_moments, packed_sum, projection,
        band_energies, sampled_gradient,
    )
}  # fmt: skip
OTHERS: dict[str, Callable[..., Iterator[Row]]] = {
    case.__name__: case for case in (ceilings, eigh, end_to_end)
}


def _ratio(peer: str, ours: str = "ours") -> Callable[[Mapping[str, Timing]], Row]:
    def row(times: Mapping[str, Timing]) -> Row:
        if peer not in times:
            return {ours: times[ours].ms}
        ratio = times[peer].ms / times[ours].ms
        return {ours: times[ours].ms, peer: times[peer].ms, "ratio": ratio}

    return row


def _cublas(x: Tensor) -> dict[str, Call]:
    d = x.shape[1]
    out = torch.zeros(d, d, device=DEVICE)

    def addmm() -> Any:
        rows = x.float()
        return out.addmm_(rows.T, rows)

    peers = {"addmm_fp32": without_tf32(addmm), "addmm_tf32": with_tf32(addmm)}
    if x.dtype == torch.bfloat16:
        peers["mm_out_dtype"] = lambda: _mm(out, x.T, x)
        peers["addmm_out_dtype"] = lambda: torch.addmm(out, x.T, x, out_dtype=torch.float32)
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


def _below(error: float, bound: float) -> float:
    assert error < bound, (error, bound)
    return error
