"""What is not finite counts nowhere: not in a layer's A or G, nor in a step that AMP skipped."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvfast
from curvfast.errors import CoverageError, NonFiniteError
from curvfast.ops import devices

pytestmark = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")

BLOCKS, ROWS = 3, 9
NAMES = [f"blocks.{i}.{part}" for i in range(BLOCKS) for part in ("gate", "up", "down")]
BAD = [float("nan"), float("inf")]


class Block(nn.Module):
    """A gated MLP: two layers that read one tensor, and one below them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, width + 3), nn.Linear(width, width + 3)
        self.down = nn.Linear(width + 3, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.gate(x)) * self.up(x))


class Net(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width) for _ in range(BLOCKS)))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


class Taps:
    """Every input and gradient of the chosen layers, of each backward; one of them spoilt."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self.spoil: tuple[str, float] | None = None
        """A layer whose next gradient gets one such value."""
        for name in NAMES:
            # Before those of a measurement, which therefore see what these made of a gradient.
            model.get_submodule(name).register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def watch(module: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
            x = args[0].detach().clone()

            def arrive(g: Tensor) -> Tensor | None:
                spoilt = None
                if self.spoil is not None and self.spoil[0] == name:
                    spoilt, (_, value), self.spoil = g.clone(), self.spoil, None
                    spoilt[ROWS // 2, 2] = value
                self.seen[name].append((x, (g if spoilt is None else spoilt).clone()))
                return spoilt

            if y.requires_grad:
                y.register_hook(arrive)

        return watch

    def finite(self, name: str) -> list[int]:
        """Which of its calls were finite."""
        return [
            i
            for i, (x, g) in enumerate(self.seen[name])
            if bool(torch.isfinite(x).all() and torch.isfinite(g).all())
        ]

    def rows(self, name: str, calls: list[int]) -> tuple[Tensor, Tensor]:
        x, g = zip(*(self.seen[name][i] for i in calls), strict=True)
        return torch.cat(x).double(), torch.cat(g).double()


def batches(count: int = 5, width: int = 6) -> list[Tensor]:
    return [torch.randn(ROWS, width) for _ in range(count)]


def loss(model: nn.Module, x: Tensor) -> Tensor:
    labels = torch.arange(len(x)) % 5
    return nn.functional.cross_entropy(model(x), labels, reduction="sum")


def near(found: Tensor, rows: Tensor, weights: Tensor | None = None) -> bool:
    expected = rows.T @ (rows if weights is None else weights[:, None] * rows)
    return bool((found.double() - expected).norm() <= 1e-5 * expected.norm())


def same(
    factors: Any, taps: Taps, calls: dict[str, list[int]], units: Tensor | None = None
) -> None:
    """Compare the factors of each layer with the definition over some of its calls."""
    assert set(factors) == {name for name in NAMES if calls[name]}
    for name, layer in factors.items():
        x, g = taps.rows(name, calls[name])
        if units is not None:
            g = g * units[calls[name]].repeat_interleave(ROWS)[:, None]
        assert layer.rows_a == layer.rows_g == len(x), name
        assert near(layer.a_sum, x), name
        assert near(layer.g_sum, g), name
        if layer.a_weighted is not None:
            assert near(layer.a_weighted, x, g.square().sum(1)), name
            assert near(layer.g_weighted, g, x.square().sum(1)), name


def all_finite(measurement: Any) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in measurement.state()[1].values())


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("layer", NAMES)
def test_a_bad_gradient_is_left_out_there_and_below_and_kept_above(layer: str, bad: float) -> None:
    model = Net()
    taps = Taps(model)
    with curvfast.collect(model, NAMES, loss_reduction="sum") as curvature:
        for i, x in enumerate(batches()):
            taps.spoil = (layer, bad) if i == 1 else None
            loss(model, x).backward()
            assert all_finite(curvature)
    finite = {name: taps.finite(name) for name in NAMES}
    block, part = int(layer.split(".")[1]), layer.split(".")[2]
    clean = {name for name in NAMES if len(finite[name]) == 5}
    above = {name for name in NAMES if int(name.split(".")[1]) > block}
    beside = {f"blocks.{block}.down"} | {f"blocks.{block}.{p}" for p in ("gate", "up") if p != part}
    assert clean == above | (beside if part != "down" else set())
    same(curvature.factors(), taps, finite)


@pytest.mark.parametrize(
    "options",
    [
        {"spill_every": 2}, {"sums_device": "cpu"}, {"sums_device": "disk"}, {"marginals": True},
        {"share_inputs": False},
    ],
)  # fmt: skip
@pytest.mark.parametrize("width", [6, 129])
def test_wherever_and_whatever_is_summed(width: int, options: dict[str, Any]) -> None:
    model = Net(width)
    taps = Taps(model)
    with curvfast.collect(model, NAMES, loss_reduction="sum", **options) as curvature:
        for i, x in enumerate(batches(width=width)):
            taps.spoil = ("blocks.1.up", float("nan")) if i in (0, 3) else None
            loss(model, x).backward()
            assert all_finite(curvature)
    same(curvature.factors(), taps, {name: taps.finite(name) for name in NAMES})


def test_layers_that_read_one_tensor_share_its_sum_until_one_is_left_out() -> None:
    model = Net()
    taps = Taps(model)
    with curvfast.collect(model, NAMES, loss_reduction="sum") as curvature:
        loss(model, batches()[0]).backward()
        factors = curvature.factors()
        assert factors["blocks.1.gate"].a_sum is factors["blocks.1.up"].a_sum
        taps.spoil = ("blocks.1.up", float("nan"))
        loss(model, batches()[0]).backward()
        factors = curvature.factors()
    assert factors["blocks.1.gate"].rows_a == 2 * ROWS
    assert factors["blocks.1.up"].rows_a == ROWS
    assert factors["blocks.2.gate"].a_sum is factors["blocks.2.up"].a_sum


class Masked(nn.Module):
    """An input that is bad in one row, whose output is not used: its gradient is finite."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor, spoilt: bool) -> Tensor:
        hidden = torch.tanh(self.first(x))
        used = torch.arange(len(x))[:, None] != 2
        seen = hidden.detach().clone()
        if spoilt:
            seen[2] = float("nan")
        return self.head(hidden + torch.where(used, self.inner(seen), torch.zeros(())))


@pytest.mark.parametrize("counted", [True, False])
def test_a_bad_input_counts_nowhere_unless_its_row_does_not(counted: bool) -> None:
    model = Masked()
    rule = None if counted else lambda name, shape: torch.arange(shape[0]) != 2
    with curvfast.collect(model, ["first", "inner"], loss_reduction="sum", rows=rule) as curvature:
        for i in range(3):
            y = model(torch.randn(ROWS, 6), i == 1)
            nn.functional.cross_entropy(y, torch.arange(ROWS) % 5, reduction="sum").backward()
            assert all_finite(curvature)
    factors = curvature.factors()
    rows = ROWS if counted else ROWS - 1
    assert factors["first"].rows_a == factors["first"].rows_g == 3 * rows
    expected = 2 * rows if counted else 3 * rows
    assert factors["inner"].rows_a == factors["inner"].rows_g == expected


@pytest.mark.parametrize("reader", ["factors", "state"])
def test_sums_that_overflow_are_refused_by_name(reader: str) -> None:
    model = Net()
    with curvfast.collect(model, NAMES, loss_reduction="sum") as curvature:
        loss(model, batches()[0]).backward()
        (loss(model, batches()[0]) * 1e25).backward()
        with pytest.raises(NonFiniteError, match=r"gradients of 'blocks\.\d\.\w+' overflowed"):
            getattr(curvature, reader)()


class TestScaledSteps:
    """Loops with a GradScaler."""

    @contextmanager
    def loop(self, **options: Any) -> Iterator[tuple[Any, Taps, Any, Any]]:
        model = Net()
        taps = Taps(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=2)
        with curvfast.collect(
            model, NAMES, loss_reduction="sum", grad_scaler=scaler, **options
        ) as curvature:
            yield model, taps, scaler, curvature

    def run(
        self, parts: int = 1, *, optimizers: int = 1, unscale: bool = False,
        bad: str = "blocks.1.down", **options: Any,
    ) -> tuple[Any, Taps, list[int], Tensor]:  # fmt: skip
        """Five steps of some backwards each, of which the second and fourth are skipped."""
        units, taken = [], []
        with self.loop(**options) as (model, taps, scaler, curvature):
            groups = [list(model.blocks[:2].parameters()), list(model.blocks[2:].parameters())]
            groups = groups if optimizers == 2 else [[*groups[0], *groups[1]]]
            chosen = [torch.optim.SGD(group, 0.01) for group in groups]
            for step in range(5):
                for part in range(parts):
                    if step in (1, 3) and part == 0:
                        taps.spoil = (bad, float("inf"))
                    units.append(1 / scaler.get_scale())
                    scaler.scale(loss(model, batches()[0])).backward()
                before = scaler.get_scale()
                for each in chosen:
                    if unscale:
                        scaler.unscale_(each)
                    scaler.step(each)
                scaler.update()
                for each in chosen:
                    each.zero_grad()
                if scaler.get_scale() >= before:
                    taken += range(step * parts, (step + 1) * parts)
                assert all_finite(curvature)
        assert len(taken) == 3 * parts
        return curvature, taps, taken, torch.tensor(units, dtype=torch.float64)

    @pytest.mark.parametrize("parts", [1, 3])
    @pytest.mark.parametrize(
        "options",
        [
            {}, {"unscale": True}, {"optimizers": 2}, {"spill_every": 2}, {"sums_device": "disk"},
            {"marginals": True}, {"bad": "blocks.0.up"}, {"bad": "blocks.2.gate"},
        ],
    )  # fmt: skip
    def test_a_skipped_step_counts_in_no_layer(self, parts: int, options: dict[str, Any]) -> None:
        curvature, taps, taken, units = self.run(parts, **options)
        same(curvature.factors(), taps, dict.fromkeys(NAMES, taken), units)

    def test_shared_inputs_stay_shared(self) -> None:
        factors = self.run()[0].factors()
        assert factors["blocks.0.gate"].a_sum is factors["blocks.0.up"].a_sum

    def test_a_reading_leaves_out_a_step_that_is_not_decided(self) -> None:
        with self.loop() as (model, _, scaler, curvature):
            optimizer = torch.optim.SGD(model.blocks.parameters(), 0.01)
            for rows in (ROWS, 2 * ROWS):
                scaler.scale(loss(model, batches()[0])).backward()
                if rows > ROWS:
                    assert curvature.factors().rows == rows - ROWS
                scaler.step(optimizer)
                scaler.update()
                assert curvature.factors().rows == rows

    @pytest.mark.parametrize("stepped", [False, True])
    def test_a_last_step_without_an_update_counts_unless_it_was_skipped(
        self, stepped: bool
    ) -> None:
        for bad in (False, True):
            with self.loop() as (model, taps, scaler, curvature):
                optimizer = torch.optim.SGD(model.blocks.parameters(), 0.01)
                for last in (False, True):
                    if bad and last:
                        taps.spoil = ("blocks.1.down", float("inf"))
                    scaler.scale(loss(model, batches()[0])).backward()
                    if stepped or not last:
                        scaler.step(optimizer)
                    if not last:
                        scaler.update()
                        optimizer.zero_grad()
            calls = {name: taps.finite(name) for name in NAMES}
            if stepped and bad:
                calls = {name: [0] for name in NAMES}
            same(curvature.factors(), taps, calls, torch.full((2,), 1 / 512.0, dtype=torch.float64))

    def test_a_disabled_scaler_leaves_nothing_pending(self) -> None:
        model, scaler = Net(), torch.amp.GradScaler("cpu", enabled=False)
        with curvfast.collect(model, NAMES, loss_reduction="sum", grad_scaler=scaler) as curvature:
            scaler.scale(loss(model, batches()[0])).backward()
            assert curvature.factors().rows == ROWS

    def test_the_scale_is_read_once_a_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        read = []
        original = torch.amp.GradScaler.get_scale
        with self.loop() as (model, _, scaler, _):
            optimizer = torch.optim.SGD(model.blocks.parameters(), 0.01)
            monkeypatch.setattr(
                torch.amp.GradScaler, "get_scale", lambda self: read.append(1) or original(self)
            )
            for _ in range(4):
                for _ in range(3):
                    scaler.scale(loss(model, batches()[0])).backward()
                scaler.step(optimizer)
                scaler.update()
        assert len(read) <= 4

    @pytest.mark.parametrize("per", ["position", "sequence"])
    def test_corrections_leave_it_out_too(self, per: str) -> None:
        model = Net()
        basis = curvfast.collect_from(model, batches(), NAMES, progress=False).eigh()
        frozen, taps = copy.deepcopy(model), Taps(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        data = batches()
        with curvfast.collect_corrections(
            model, basis, per=per, loss_reduction="sum", grad_scaler=scaler
        ) as correction:
            for i, x in enumerate(data):
                taps.spoil = ("blocks.1.down", float("inf")) if i == 2 else None
                scaler.scale(loss(model, x)).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                assert all_finite(correction)
        with curvfast.collect_corrections(frozen, basis, per=per, loss_reduction="sum") as plain:
            for x in data[:2] + data[3:]:
                loss(frozen, x).backward()
        equal(correction.corrections(), plain.corrections())


def equal(found: Any, expected: Any) -> None:
    assert set(found.layers) == set(expected.layers)
    for name, layer in expected.layers.items():
        assert found.layers[name].count == layer.count, name
        difference = found.layers[name].sum - layer.sum
        assert difference.norm() <= 1e-5 * layer.sum.norm(), name


@pytest.mark.parametrize("spill_every", [None, 2])
@pytest.mark.parametrize("layer", ["blocks.2.down", "blocks.1.gate"])
def test_corrections_leave_out_a_bad_gradient(layer: str, spill_every: int | None) -> None:
    model = Net()
    basis = curvfast.collect_from(model, batches(), NAMES, progress=False).eigh()
    twin, taps, data = copy.deepcopy(model), Taps(model), batches()
    options: dict[str, Any] = {"loss_reduction": "sum", "spill_every": spill_every}
    with curvfast.collect_corrections(model, basis, **options) as correction:
        for i, x in enumerate(data):
            taps.spoil = (layer, float("nan")) if i == 1 else None
            loss(model, x).backward()
            assert all_finite(correction)
    with curvfast.collect_corrections(twin, basis, **options) as all_of_them:
        for x in data:
            loss(twin, x).backward()
    with curvfast.collect_corrections(twin, basis, **options) as without:
        for x in data[:1] + data[2:]:
            loss(twin, x).backward()
    found, every, fewer = (c.corrections() for c in (correction, all_of_them, without))
    for name in NAMES:
        whole = len(taps.finite(name)) == 5
        expected = (every if whole else fewer).layers[name]
        assert found.layers[name].count == expected.count, name
        difference = found.layers[name].sum - expected.sum
        assert difference.norm() <= 1e-5 * expected.sum.norm(), name


def test_a_driven_batch_of_bad_inputs_counts_nowhere() -> None:
    model, data = Net(), batches()
    data[1][3, 2] = float("nan")
    found = curvfast.collect_from(model, data, NAMES, progress=False)
    for name in NAMES:
        assert found[name].rows_a == found[name].rows_g == 4 * ROWS
        assert torch.isfinite(found[name].a_sum).all()
        assert torch.isfinite(found[name].g_sum).all()


@pytest.mark.parametrize("marginals", [False, True])
def test_a_driven_batch_with_a_bad_gradient_is_left_out_or_refused(marginals: bool) -> None:
    model = Net()
    taps = Taps(model)

    def data() -> Iterator[Tensor]:
        for i, x in enumerate(batches()):
            taps.spoil = ("blocks.1.down", float("nan")) if i == 1 else None
            yield x

    def run() -> Any:
        return curvfast.collect_from(model, data(), NAMES, progress=False, marginals=marginals)

    if not marginals:
        # Inputs are added in the forward, before anything is known of the gradients.
        with pytest.raises(CoverageError, match="45 inputs but 36 gradients"):
            run()
        return
    factors = run()
    for name in NAMES[6:]:
        assert factors[name].rows_a == factors[name].rows_g == 5 * ROWS
    for name in NAMES[:6]:
        assert factors[name].rows_a == factors[name].rows_g == 4 * ROWS
        assert torch.isfinite(factors[name].a_sum).all()


@pytest.mark.cpu_branches
@pytest.mark.parametrize("kind", ["factors", "corrections"])
def test_on_an_accelerator_sums_refuse_to_be_read_and_say_why(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Net()
    basis = curvfast.collect_from(model, batches(), NAMES, progress=False).eigh()
    monkeypatch.setattr(devices, "on_accelerator", lambda device: True)
    taps = Taps(model)
    begin = (
        curvfast.collect(model, NAMES, loss_reduction="sum")
        if kind == "factors"
        else curvfast.collect_corrections(model, basis, loss_reduction="sum")
    )
    with begin as measurement:
        loss(model, batches()[0]).backward()
        assert all_finite(measurement)
        taps.spoil = ("blocks.1.gate", float("nan"))
        loss(model, batches()[0]).backward()
        for read in (getattr(measurement, kind), measurement.state):
            with pytest.raises(NonFiniteError, match=r"'blocks\.1\.gate': its gradient in batch"):
                read()
