"""Backends: an explicit choice is honoured or refused, "auto" falls back and says so.

Last: the operations as torch knows them.
"""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import curvfast
from curvfast import ops
from curvfast.errors import BackendUnavailable, InputError
from curvfast.ops import TriangularSum, reference, registry
from curvfast.ops.native import extension


def sums(d: int = 32) -> TriangularSum:
    return TriangularSum.zeros(d, 32)


def test_backends_tell_what_is_there() -> None:
    found = ops.backends()
    assert list(found) == ["triton", "native", "torch", "reference"]
    assert found["torch"] == found["reference"] == "available"


def test_a_machine_without_a_gpu_says_so() -> None:
    code = (
        "from curvfast import backends, use_backend; print(backends()['triton'])\n"
        "try:\n    use_backend('triton').__enter__()\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    environment = {"PATH": "", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert "there is no CUDA device" in done.stdout.splitlines()[0]
    assert done.stdout.splitlines()[1].startswith("BackendUnavailable backend 'triton' cannot")


@pytest.mark.skipif(extension.unavailable() is not None, reason=extension.unavailable() or "")
def test_every_machine_can_multiply_by_portable_code() -> None:
    code = (
        "import torch; from curvfast import backends, ops; print(backends()['native'])\n"
        "x, out = torch.arange(400).reshape(4, 100).remainder(7).float(), ops.new_sum(100)\n"
        "ops.second_moment_(out, x); print(torch.equal(out.dense(), x.T @ x))"
    )
    environment = {"PATH": "", "CUDA_VISIBLE_DEVICES": "", "CURVFAST_ISA": "portable"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.splitlines() == ["available; second moments by portable", "True"]


def test_an_explicit_choice_raises_where_it_cannot_be_honoured() -> None:
    with (
        ops.use_backend("triton"),
        pytest.raises(BackendUnavailable, match=r"cannot run second_moment_: .*float64"),
    ):
        ops.second_moment_(sums(), torch.zeros(3, 32, dtype=torch.float64))
    with ops.use_backend("reference"), pytest.raises(BackendUnavailable, match="not implement"):
        ops.sampled_gradient_(torch.zeros(2, 3), None, torch.Generator())


def test_auto_falls_back_and_says_so_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_told", set())
    first = registry.Backend("first", {"op": lambda: 1}, {"op": lambda: "not today"})
    second = registry.Backend("second", {"op": lambda: 2}, {"op": lambda: None})
    monkeypatch.setattr(registry, "_backends", {"first": first, "second": second})
    with caplog.at_level(logging.INFO, "curvfast"):
        assert [registry.resolve("op")() for _ in range(3)] == [2, 2, 2]
    assert caplog.text.count("not today") == 1


def test_a_bug_in_a_refusal_is_not_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise ZeroDivisionError

    first = registry.Backend("first", {"op": lambda: 1}, {"op": broken})
    second = registry.Backend("second", {"op": lambda: 2}, {"op": lambda: None})
    monkeypatch.setattr(registry, "_backends", {"first": first, "second": second})
    with pytest.raises(ZeroDivisionError):
        registry.resolve("op")


def test_the_environment_chooses_and_the_context_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    request = ops.MomentRequest(sums(), torch.zeros(2, 32))
    monkeypatch.setenv("CURVFAST_BACKEND", "reference")
    chosen = registry.resolve("second_moment_", request.traits)
    with ops.use_backend("torch"):
        assert registry.resolve("second_moment_", request.traits) is not chosen
    assert registry.resolve("second_moment_", request.traits) is chosen
    monkeypatch.setenv("CURVFAST_BACKEND", "cuda")
    with pytest.raises(InputError, match=r"CURVFAST_BACKEND: there is no backend 'cuda'"):
        registry.resolve("second_moment_", request.traits)
    with pytest.raises(InputError, match=r"use_backend: there is no backend 'gpu'"):
        ops.use_backend("gpu").__enter__()


def test_the_interpreter_is_never_chosen_unasked() -> None:
    chosen = registry.resolve(
        "second_moment_", ops.MomentRequest(sums(), torch.zeros(2, 32)).traits
    )
    with ops.use_backend("triton"):
        kernels = registry.resolve(
            "second_moment_", ops.MomentRequest(sums(), torch.zeros(2, 32)).traits
        )
    if not torch.cuda.is_available():
        assert chosen is not kernels


needs_native = pytest.mark.skipif(extension.unavailable() is not None, reason="built without it")


@needs_native
@pytest.mark.parametrize("named", ["auto", "native", "torch", "triton"])
def test_a_search_runs_natively_unless_the_reference_is_named(named: str) -> None:
    with ops.use_backend(named):
        for search in registry.SEARCHES:
            assert registry.resolve(search) is getattr(extension, search)
    with ops.use_backend("reference"):
        for search in registry.SEARCHES:
            assert registry.resolve(search) is getattr(reference, search)


@needs_native
def test_the_reference_by_name_keeps_the_native_core_out_of_a_whole_edit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 8))
    with curvfast.collect(model, layers="all", loss_reduction="sum") as curvature:
        model(torch.randn(60, 12)).square().mean().backward()
    basis, twin = curvature.factors().eigh(), copy.deepcopy(model)
    kept = basis.keep(mass=0.7)
    curvfast.edit(model, basis, mass=0.7)
    monkeypatch.setattr(extension, "_C", None)
    with ops.use_backend("reference"):
        again = basis.keep(mass=0.7)
        curvfast.edit(twin, basis, mass=0.7)
    assert all(torch.equal(kept[name].widths, again[name].widths) for name in basis)
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_a_search_without_the_native_core_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    native = replace(registry._backends["native"], unavailable=lambda: "not built today")
    monkeypatch.setitem(registry._backends, "native", native)
    monkeypatch.setattr(registry, "_told", set())
    with caplog.at_level(logging.INFO, "curvfast"):
        assert registry.resolve("staircase_by_mass") is reference.staircase_by_mass
        assert registry.resolve("cheapest_split") is reference.cheapest_split
        with ops.use_backend("torch"):
            assert registry.resolve("scores_by_mass") is reference.scores_by_mass
    assert caplog.text.count("about 30 times slower") == caplog.text.count("not built today") == 1


SAMPLES: dict[str, Any] = {
    "second_moment_": lambda: (torch.zeros(32 * 3, 32), torch.randn(9, 40), 40),
    "second_moment_.rows": lambda: (
        torch.zeros(32, 32), torch.randn(9, 30), 30, torch.tensor([1, 4]), None, torch.rand(9), 2.0,
        torch.zeros(32, 32), torch.rand(9),
    ),
    "project_": lambda: (
        torch.empty(8, 6), torch.randn(8, 6), torch.eye(8), torch.eye(6),
        torch.tensor([6, 5, 3, 3, 1, 0, 0, 0]), True,
    ),
    "band_energies_": lambda: (torch.empty(5, 2), torch.randn(5, 6), torch.eye(6), [0, 2, 6]),
    "sampled_gradient_": lambda: (
        torch.randn(4, 7), torch.empty(4, dtype=torch.long), torch.tensor([0, 2]), 5
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLES)
def test_torch_accepts_the_operation(name: str) -> None:
    operation = getattr(torch.ops.curvfast, name.split(".")[0]).default
    torch.library.opcheck(operation, SAMPLES[name]())


def test_compiled_whole_graphs_give_the_eager_result() -> None:
    x, vectors = torch.randn(20, 40), torch.linalg.qr(torch.randn(40, 40))[0]
    weight, widths = torch.randn(40, 40), torch.arange(40, 0, -1)

    def everything(out: TriangularSum, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ops.second_moment_(out, 2 * x, scale=0.5)
        return (
            ops.band_energies(x + 1, vectors, [0, 7, 40]),
            ops.project(weight, vectors, vectors, widths),
        )

    eager_sum, compiled_sum = TriangularSum.zeros(40, 16), TriangularSum.zeros(40, 16)
    expected = everything(eager_sum, x)
    found = torch.compile(everything, fullgraph=True, backend="aot_eager")(compiled_sum, x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(compiled_sum.dense(), eager_sum.dense())


def test_calls_alike_are_asked_about_once_and_anew_when_the_choice_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def refusal(traits: int) -> str | None:
        asked.append(traits)
        return os.environ.get("CURVFAST_SWITCH")

    first = registry.Backend("first", {"op": min}, {"op": refusal}, variables=("CURVFAST_SWITCH",))
    second = registry.Backend("second", {"op": max}, {})
    monkeypatch.setattr(registry, "_backends", {"first": first, "second": second})
    assert [registry.resolve_alike("op", 1) for _ in range(3)] == [min] * 3
    assert registry.resolve_alike("op", 2) is min
    assert asked == [1, 2]
    monkeypatch.setenv("CURVFAST_SWITCH", "off")
    assert registry.resolve_alike("op", 1) is max
    monkeypatch.delenv("CURVFAST_SWITCH")
    with ops.use_backend("second"):
        assert registry.resolve_alike("op", 1) is max
    monkeypatch.setenv("CURVFAST_BACKEND", "second")
    assert registry.resolve_alike("op", 1) is max
    monkeypatch.delenv("CURVFAST_BACKEND")
    monkeypatch.setitem(registry._backends, "first", replace(first, unavailable=lambda: "gone"))
    assert registry.resolve_alike("op", 1) is max
