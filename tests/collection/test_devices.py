"""Devices but the CPU, and torch's defaults: nothing measured may depend on either."""

from __future__ import annotations

import ast
import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import llama, token_batches
from torch import Tensor

import curvfast
from curvfast import ops
from curvfast.collection.likelihood import sampled_gradient
from curvfast.collection.placement import CopiedSums, Placement
from curvfast.collection.step import Asked, run_step
from curvfast.kfac import decomposition, eigh
from curvfast.kfac.decomposition import decompose_factor
from curvfast.kfac.selection.staircase import staircase_by_mass
from curvfast.model.batch import Batch
from curvfast.model.rows import AllRows, ChosenRows, FirstRows, Thinning
from curvfast.ops import MomentRequest, TriangularSum, devices, second_moment
from curvfast.ops.launch import availability

pytestmark = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")

CPU, META = torch.device("cpu"), torch.device("meta")
QUESTIONS = {"on_accelerator": devices, "takes_kernels": devices, "takes_batches": decomposition}
PACKAGE = Path(curvfast.__file__).parent


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, int]]:
    """Answer every question as an accelerator would; return where it was asked."""
    asked: set[tuple[str, int]] = set()

    def yes(device: torch.device) -> bool:
        frame = sys._getframe(1)
        asked.add((str(Path(frame.f_code.co_filename).relative_to(PACKAGE)), frame.f_lineno))
        return True

    for question, home in QUESTIONS.items():
        monkeypatch.setattr(home, question, yes)
    return asked


def places_that_ask() -> set[tuple[str, int]]:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in QUESTIONS:
                found.add((str(path.relative_to(PACKAGE)), node.lineno))
    return found


def test_every_branch_of_an_accelerator_is_run(
    forced: set[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama(num_hidden_layers=1)
    factors = curvfast.collect_from(model, token_batches("none"), progress=False)
    basis = factors.eigh()
    with curvfast.collect(model), curvfast.collect_corrections(model, basis):
        model(**token_batches("none")[0]).loss.backward()
    bare = [{"input_ids": batch["input_ids"]} for batch in token_batches("none")]
    curvfast.collect_from(model, bare, progress=False)
    # Rows of two bytes alone wait to share a launch.
    half = llama(num_hidden_layers=1).bfloat16()
    curvfast.collect_from(half, token_batches("none"), progress=False)
    curvfast.plan_collection(model, tokens=1000, batch=2, seq_len=8, device="cuda")
    original = torch.linalg.eigh
    failures = iter([RuntimeError("the first solver fails")])

    def eigh(matrix: Tensor) -> Any:
        for failure in failures:
            raise failure
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    decompose_factor(torch.eye(3), dtype=torch.float64, title="the identity")
    places = places_that_ask()
    assert len(places) >= 7
    assert places <= forced


@pytest.mark.parametrize("padding", ["none", "right"])
def test_sampled_labels_are_those_of_a_cpu(
    padding: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    model, batches = llama(num_hidden_layers=1), token_batches(padding)

    def run() -> tuple[int, Any]:
        generator = torch.Generator().manual_seed(3)
        labels = run_step(
            copy.deepcopy(model), batches[0], Asked("sampled", causal=True), generator
        )
        return labels, curvfast.collect_from(model, batches, "all", progress=False)

    count, expected = run()
    request.getfixturevalue("forced")
    again, found = run()
    mask = batches[0].get("attention_mask", torch.ones_like(batches[0]["input_ids"]))
    assert again == count == int(mask.sum()) - len(mask)
    assert found.rows == expected.rows
    for name, layer in expected.items():
        for one, two in ((found[name].A, layer.A), (found[name].G, layer.G)):
            assert (one - two).norm() <= 1e-5 * two.norm(), name


@pytest.mark.parametrize("padding", ["none", "right"])
def test_gold_labels_are_those_of_a_cpu(padding: str, request: pytest.FixtureRequest) -> None:
    model, batch = llama(num_hidden_layers=1), token_batches(padding)[0]
    batch.pop("labels")

    def labels() -> int:
        return run_step(model, batch, Asked("gold", causal=True), torch.Generator())

    expected = labels()
    request.getfixturevalue("forced")
    assert labels() == expected


@pytest.mark.parametrize(
    ("rows", "counted"),
    [
        (AllRows(6), [0, 1, 2, 3, 4, 5]),
        (FirstRows(2, 3, 2), [0, 1, 3, 4]),
        (FirstRows(3, 2, 0), []),
        (ChosenRows(torch.tensor([1, 5])), [1, 5]),
    ],
)
def test_labels_are_drawn_for_the_rows_that_count_alone(rows: Any, counted: list[int]) -> None:
    assert rows.count == len(counted)
    assert rows.indices(CPU).tolist() == counted
    x = torch.randn(6, 4)
    assert torch.equal(rows.take(x), x[counted])
    gradient, count = sampled_gradient(torch.randn(6, 4), rows, torch.Generator())
    assert count == len(counted)
    assert gradient.abs().sum(1).nonzero().flatten().tolist() == counted


@pytest.mark.parametrize("thin", [False, True])
def test_rows_are_found_once_and_lie_where_each_layer_is(thin: bool) -> None:
    shape = torch.Size([4, 11])
    draws = torch.Generator().manual_seed(1)
    mask = token_batches("right", sizes=(11,))[0]["attention_mask"].bool()
    batch = Batch(True, mask=mask, thin=Thinning(0.5, draws).thin if thin else None)
    every = batch.call_rows("layer", torch.zeros(*shape, 1), None)
    routed = batch.routed_rows("layer", torch.arange(0, 44, 2), shape, None)
    for owner, of in ((every, shape), (routed, torch.Size([22]))):
        here = owner.rows("layer", of, CPU)
        before = draws.get_state()
        there = owner.rows("layer", of, META)
        assert here.indices(CPU).device == CPU
        assert there.view(torch.ones(of, device=META)[..., None])[1].device == META
        assert there.count == here.count
        assert torch.equal(draws.get_state(), before), "drawn again: A and G would differ"
        assert owner.rows("layer", of, CPU) is here


def chain(model: Any, batches: list[Any]) -> Iterator[Tensor]:
    """Yield what is measured, decomposed and edited."""
    with curvfast.collect(model, "all", sums_device="cpu") as curvature:
        for batch in batches:
            model(**batch).loss.backward()
    for factors in (
        curvature.factors(),
        curvfast.collect_from(model, batches, sums_device="cpu", progress=False),
        curvfast.collect_from(model, batches, marginals=True, rows_per_step=0.7, progress=False),
    ):
        for layer in factors.values():
            yield from (layer.A, layer.G)
    basis = factors.eigh()
    for layer in basis.values():
        yield from (layer.values_a, layer.values_g, layer.vectors_a, layer.vectors_g)
    for layer in factors.eigh(mass=0.6).values():
        yield from (layer.values_a, layer.values_g)
    corrections = curvfast.correct(model, basis, batches, progress=False)
    yield from (corrections[name] for name in corrections)
    curvfast.edit(model, basis, mass=0.8)
    yield from (p.detach() for p in model.parameters())


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("branches", ["cpu", "accelerator"], indirect=True)
@pytest.mark.parametrize(
    "default",
    [
        lambda: default_dtype(torch.bfloat16),
        lambda: default_dtype(torch.float16),
        lambda: default_dtype(torch.float64),
        lambda: META,
    ],
    ids=["bfloat16", "float16", "float64", "meta"],
)
def test_torchs_defaults_change_nothing(default: Callable[[], Any], branches: str) -> None:
    model = llama(num_hidden_layers=1)
    batches = token_batches("none", sizes=(11, 12)) + token_batches("both", sizes=(13,))
    expected = list(chain(copy.deepcopy(model), batches))
    with default():
        found = list(chain(copy.deepcopy(model), batches))
    assert len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_is_copied_or_sent_keeps_its_dtype(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(50, 40)
    out, expected = ops.new_sum(40), ops.new_sum(40)
    ops.second_moment_(expected, x)
    with default_dtype(dtype):
        copies = CopiedSums()
        copies.add(MomentRequest(out, x))
        copies.flush()
    assert torch.equal(out.tiles, expected.tiles)

    wide = torch.randn(50, 128)
    given = MomentRequest(ops.new_sum(128, device=CPU), wide, rows=torch.arange(0, 50, 3))
    ops.second_moments_([given])
    again = replace(given, out=ops.new_sum(128, device=CPU))
    with META:
        ops.second_moments_([again])
    assert torch.equal(again.out.tiles, given.out.tiles)

    received: list[torch.dtype] = []
    everywhere = [({"a": (2, 0.0, "cpu")}, None), ({}, None)]
    monkeypatch.setattr(eigh.distributed, "gather", lambda mine, group: everywhere)
    monkeypatch.setattr(eigh, "_owners", lambda keys, widths, ranks: {"a": 0})
    monkeypatch.setattr(
        eigh.distributed, "broadcast_", lambda tensor, *_: received.append(tensor.dtype)
    )
    with default_dtype(dtype):
        dict(eigh.broadcast_results(iter(()), ["a"], {"a": 3}, object()))
    assert received == [torch.float64, torch.float32]


class TestLaunches:
    """Kernels are launched where their tensors are, whatever device is current."""

    @pytest.fixture
    def launched(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Return the names of kernels; one launched with no device chosen fails the test."""
        interpreter = pytest.importorskip("triton.runtime.interpreter")
        if not availability.interpreting():
            pytest.skip("the kernels of this process are compiled")
        depth, names = [0], []

        @contextlib.contextmanager
        def entered(x: Tensor) -> Iterator[None]:
            assert isinstance(x, Tensor)
            depth[0] += 1
            yield
            depth[0] -= 1

        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith("curvfast.ops.launch."):
                if hasattr(module, "launching"):
                    monkeypatch.setattr(module, "launching", entered)
        original = interpreter.GridExecutor.__call__

        def call(executor: Any, *args: Any, **kwargs: Any) -> Any:
            assert depth[0], f"{executor.fn.__name__} goes to whichever device is current"
            names.append(executor.fn.__name__)
            return original(executor, *args, **kwargs)

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", call)
        return names

    def test_every_kernel_is_launched_on_the_device_of_its_rows(self, launched: list[str]) -> None:
        x = torch.randn(300, 24, dtype=torch.bfloat16)
        sums = [TriangularSum.zeros(24, 32) for _ in range(2)]
        weights = torch.rand(300)
        spectra = (1 / torch.arange(1, d + 1, dtype=torch.float64) for d in (60, 75))
        staircase = staircase_by_mass(*spectra, 0.5).widths
        with ops.use_backend("triton"):
            ops.second_moment_(sums[0], x)
            ops.second_moment_(sums[0], x, weights=weights)
            ops.second_moments_([MomentRequest(out, x) for out in sums])
            ops.band_energies(x.float(), torch.eye(24), [0, 8, 24])
            ops.sampled_gradient_(torch.randn(4, 60), None, torch.Generator())
            ops.project(torch.randn(60, 75), torch.eye(60), torch.eye(75), staircase)
        assert set(launched) >= {
            "second_moment_tiles", "second_moment_rows", "second_moment_group", "add_partial_sums",
            "band_energies", "sampled_gradient", "expand", "contract",
        }  # fmt: skip

    def test_a_training_on_an_accelerator_shares_launches(
        self, launched: list[str], forced: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, batches = llama(num_hidden_layers=1).bfloat16(), token_batches("right")
        monkeypatch.setattr(second_moment, "tile_width", lambda d, device: 32)
        options: dict[str, Any] = {"labels": "gold", "progress": False}
        with ops.use_backend("reference"):
            expected = curvfast.collect_from(model, batches, "all", **options)
        with ops.use_backend("triton"):
            found = curvfast.collect_from(model, batches, "all", **options)
        assert "second_moment_group" in launched
        for name, layer in expected.items():
            for one, two in ((found[name].A, layer.A), (found[name].G, layer.G)):
                assert (one - two).norm() <= 1e-4 * two.norm(), name


def test_what_runs_on_a_side_stream_lives_until_then(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    recorded: list[tuple[int, Any]] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            made.append(self)

        def wait_stream(self, other: Any) -> None:
            pass

    current = Stream(CPU)
    made.clear()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(
        Tensor, "record_stream", lambda self, s: recorded.append((id(self), s)), raising=False
    )
    placement = Placement(overlap=True)
    x, rows, weights = torch.randn(6, 4), torch.tensor([0, 2]), torch.rand(6)
    out = ops.new_sum(4)
    for _ in range(3):
        placement.add(MomentRequest(out, x, rows=rows, weights=weights))
    placement.flush()
    assert len(made) == 1, "one stream a device, made once"
    assert recorded[:3] == [(id(tensor), made[0]) for tensor in (x, rows, weights)]
