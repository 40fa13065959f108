"""The unit of G: read off the gradient at the logits where that proves it, else refused."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from curvfast.collection.cross_entropy import evenly
from curvfast.collection.logits_reading import Reading
from curvfast.collection.logits_watch import LogitsWatch
from curvfast.collection.outputs import watchable
from curvfast.collection.returned_loss import MeanLoss, returned_loss
from curvfast.collection.unit import Counts, Told, Unit, Unknown, one_of, unit_of
from curvfast.kfac.known import PROVEN, TOLD

CE = F.cross_entropy
N = 40
NOTHING = Told()
TRAINED = {
    "untrained": (0.3, 0.0),
    "usual": (2.0, 0.0),
    "trained": (2.0, 8.0),
    "certain": (2.0, 25.0),
}
Loss = Callable[[Tensor, Tensor], Tensor]


def logits_of(
    classes: int, kind: str, dtype: torch.dtype = torch.float32, rows: int = N
) -> tuple[Tensor, Tensor]:
    scale, margin = TRAINED[kind]
    y = torch.randint(classes, (rows,))
    z = torch.randn(rows, classes) * scale
    z[torch.arange(rows), y] += margin
    return z.to(dtype).requires_grad_(), y


def read(loss: Loss, z: Tensor, y: Tensor, **seen: Tensor) -> Reading:
    z = z * 1
    watch = LogitsWatch(z, **seen)
    assert watch.reading is None
    loss(z, y).backward()
    assert watch.reading is not None
    return watch.reading


def unit(
    loss: Loss, z: Tensor, y: Tensor, *, told: Told = NOTHING, **seen: Tensor
) -> Unit | Unknown:
    return unit_of(read(loss, z, y, **seen), told, Counts(rows=y.numel()))


@dataclass(frozen=True)
class Likelihood:
    loss: Loss
    over: float
    """What its gradient is multiplied by to be of the summed loss, for N labels."""


RIGHT = {
    "mean": Likelihood(CE, N),
    "sum": Likelihood(lambda z, y: CE(z, y, reduction="sum"), 1),
    "accumulated": Likelihood(lambda z, y: CE(z, y) / 8, 8 * N),
    "scaled by AMP": Likelihood(lambda z, y: CE(z, y) * 65536, N / 65536),
    "over items": Likelihood(lambda z, y: CE(z, y, reduction="sum") / 137, 137),
    "over what is not ignored": Likelihood(
        lambda z, y: CE(z, y.where(torch.arange(N) % 4 > 0, -7), ignore_index=-7), 30
    ),
}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("classes", [2, 3, 61, 1000, 50_000])
@pytest.mark.parametrize("name", RIGHT)
def test_a_cross_entropy_tells_its_unit(name: str, classes: int, kind: str, known: bool) -> None:
    z, y = logits_of(classes, kind)
    found = unit(RIGHT[name].loss, z, y, **({"labels": y} if known else {}))
    assert isinstance(found, Unit)
    assert found.known.how == PROVEN
    assert found.value == pytest.approx(RIGHT[name].over, rel=5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["untrained", "usual", "trained"])
@pytest.mark.parametrize("classes", [2, 3, 61, 1000])
@pytest.mark.parametrize("name", ["mean", "sum", "over what is not ignored"])
def test_in_16_bits_the_unit_is_a_candidate_exactly(
    name: str, classes: int, kind: str, dtype: torch.dtype
) -> None:
    z, y = logits_of(classes, kind, dtype)
    # fp16 without a scaler underflows; loops in it have one.
    amp = 1024.0 if dtype == torch.float16 else 1.0
    found = unit(lambda z, y: RIGHT[name].loss(z.float(), y) * amp, z, y, told=Told(amp=amp))
    assert isinstance(found, Unit)
    assert found.value == RIGHT[name].over / amp


def test_in_16_bits_a_factor_nobody_told_is_asked_for() -> None:
    z, y = logits_of(61, "usual", torch.bfloat16)
    loss = lambda z, y: CE(z.float(), y) / 3  # noqa: E731
    found = unit(loss, z, y)
    assert isinstance(found, Unknown)
    assert "loss_scale=" in found.message
    followed = unit(loss, z, y, told=Told(scale=1 / 3))
    assert isinstance(followed, Unit)
    assert followed.value == pytest.approx(3 * N, rel=1e-12)


def _one_hot(z: Tensor, y: Tensor) -> Tensor:
    return F.one_hot(y, z.shape[1]).to(z.dtype)


def _each(z: Tensor, y: Tensor) -> Tensor:
    return CE(z, y, reduction="none")


def _teacher(z: Tensor) -> Tensor:
    return torch.randn(z.shape, generator=torch.Generator().manual_seed(5)).softmax(1)


def _kl(z: Tensor) -> Tensor:
    return F.kl_div(z.log_softmax(1), _teacher(z), reduction="batchmean")


def _entropy(z: Tensor) -> Tensor:
    return -(z.softmax(1) * z.log_softmax(1)).sum(1).mean()


def _preference(z: Tensor, y: Tensor) -> Tensor:
    chosen, rejected = _each(z, y).neg().view(2, -1).sum(1)
    return -F.logsigmoid(0.1 * (chosen - rejected))


WRONG: dict[str, Loss] = {
    "class weights": lambda z, y: CE(z, y, weight=torch.linspace(0.5, 1.5, z.shape[1])),
    "means of sequence means": lambda z, y: (_each(z, y)[:10].mean() + _each(z, y)[10:].mean()) / 2,
    "focal": lambda z, y: ((1 - (-_each(z, y)).exp()) ** 2 * _each(z, y)).mean(),
    "z-loss beside": lambda z, y: CE(z, y) + 1e-2 * z.logsumexp(1).square().mean(),
    "squared error": lambda z, y: F.mse_loss(z, _one_hot(z, y)),
    "Bernoullis": lambda z, y: F.binary_cross_entropy_with_logits(z, _one_hot(z, y)),
    "KL": lambda z, y: _kl(z),
    "a tenth of a KL beside": lambda z, y: CE(z, y) + 0.1 * _kl(z),
    "entropy bonus": lambda z, y: CE(z, y) - 0.1 * _entropy(z),
    "preference": _preference,
    "advantages": lambda z, y: (_each(z, y) * torch.linspace(-1, 1, N)).mean(),
    "hinge": lambda z, y: F.multi_margin_loss(z, y),
    "temperature": lambda z, y: CE(z / 2, y),
    "Brier": lambda z, y: (z.softmax(1) - _one_hot(z, y)).square().sum(1).mean(),
    "softcap outside": lambda z, y: CE(3 * (z / 3).tanh(), y),
}  # fmt: skip


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kind", ["usual", "trained"])
@pytest.mark.parametrize("classes", [2, 3, 10, 61, 1000])
@pytest.mark.parametrize("name", WRONG)
def test_nothing_else_is_taken_for_one(name: str, classes: int, kind: str, known: bool) -> None:
    z, y = logits_of(classes, kind)
    found = unit(WRONG[name], z, y, **({"labels": y} if known else {}))
    assert isinstance(found, Unknown), found
    for way_out in ("loss_reduction='sum'", "curvature.labels(n)", "loss_scale="):
        assert way_out in found.message


@pytest.mark.parametrize("name", ["class weights", "means of sequence means", "focal"])
def test_weights_that_differ_by_row_are_told_from_other_losses(name: str) -> None:
    z, y = logits_of(61, "usual")
    assert read(WRONG[name], z, y).weights_differ
    assert not read(WRONG["z-loss beside"], z, y).weights_differ


@given(
    share=st.floats(0.01, 10),
    classes=st.integers(3, 200),
    seed=st.integers(0, 10_000),
    name=st.sampled_from(["KL", "entropy bonus", "squared error", "Bernoullis", "Brier"]),
)
@settings(max_examples=80, deadline=None)
def test_a_mixture_is_never_taken_for_one(share: float, classes: int, seed: int, name: str) -> None:
    torch.manual_seed(seed)
    z, y = logits_of(classes, "usual")
    assert isinstance(unit(lambda z, y: CE(z, y) + share * WRONG[name](z, y), z, y), Unknown)


@given(
    factor=st.floats(1e-6, 1e6), classes=st.integers(2, 300), rows=st.integers(2, 60),
    kind=st.sampled_from(sorted(TRAINED)), seed=st.integers(0, 10_000), known=st.booleans(),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_any_factor_of_the_loop_is_in_the_unit(
    factor: float, classes: int, rows: int, kind: str, seed: int, known: bool
) -> None:
    torch.manual_seed(seed)
    z, y = logits_of(classes, kind, rows=rows)
    found = unit(lambda z, y: CE(z, y) * factor, z, y, **({"labels": y} if known else {}))
    assert isinstance(found, Unit)
    assert found.value == pytest.approx(rows / factor, rel=6e-5)


def test_rows_that_are_certain_of_another_class_prove_nothing() -> None:
    z, y = logits_of(2, "certain")
    assert isinstance(unit(lambda z, y: CE(z, y, label_smoothing=0.1), z, y), Unknown)


@pytest.mark.parametrize("classes", [10, 61, 1000])
def test_label_smoothing_tells_its_unit_and_strength(classes: int) -> None:
    z, y = logits_of(classes, "usual")
    shown = read(lambda z, y: CE(z, y, label_smoothing=0.1) / 3, z, y)
    assert not shown.hard.holds(shown.tolerance)
    assert shown.smoothing == pytest.approx(0.1, rel=1e-4)
    found = unit_of(shown, Told())
    assert isinstance(found, Unit)
    assert found.value == pytest.approx(3 * N, rel=2e-5)


@pytest.mark.parametrize(("classes", "kind"), [(3, "usual"), (61, "certain")])
def test_label_smoothing_that_cannot_be_told_apart_is_asked_for(classes: int, kind: str) -> None:
    z, y = logits_of(classes, kind)
    assert isinstance(unit(lambda z, y: CE(z, y, label_smoothing=0.1), z, y), Unknown)


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("classes", [3, 61, 1000])
def test_probabilities_as_labels_tell_it_where_they_are_given(classes: int, kind: str) -> None:
    z, y = logits_of(classes, kind)
    q = (torch.randn_like(z) * 2).softmax(1)
    found = unit(lambda z, _: CE(z, q), z, y, labels=q)
    assert isinstance(found, Unit)
    assert found.value == N
    assert isinstance(unit(lambda z, _: CE(z, q), z, y), Unknown)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("length", [4, 9])
def test_classes_are_on_the_axis_where_the_gradient_sums_to_zero(length: int, known: bool) -> None:
    z = torch.randn(5, 4, length, requires_grad=True)
    y = torch.randint(4, (5, length))
    found = unit(CE, z, y, **({"labels": y} if known else {}))
    assert isinstance(found, Unit)
    assert found.value == 5 * length


def _images(known: bool) -> Unit | Unknown:
    z, y = torch.randn(2, 5, 3, 6, requires_grad=True), torch.randint(5, (2, 3, 6))
    return unit(CE, z, y, **({"labels": y} if known else {}))


@pytest.mark.parametrize("known", [True, False])
def test_classes_of_pixels_are_on_the_second_axis(known: bool) -> None:
    found = _images(known)
    assert isinstance(found, Unit)
    assert found.value == 36


def shifted(z: Tensor, y: Tensor, **options: object) -> Tensor:
    return CE(z[:, :-1].flatten(0, 1), y[:, 1:].flatten(), **options)  # type: ignore[arg-type]


def in_place(z: Tensor, y: Tensor) -> Tensor:
    return CE(z.flatten(0, 1), y.flatten())


@pytest.mark.parametrize("seen", ["labels", "input_ids"])
def test_where_the_labels_are_is_told(seen: str) -> None:
    z, y = torch.randn(3, 12, 50, requires_grad=True), torch.randint(50, (3, 12))
    for loss, expected in ((shifted, True), (in_place, False)):
        shown = read(loss, z, y, **{seen: y})
        assert shown.votes.shifted is expected
        if seen == "labels":
            assert shown.counted_labels == [33 if expected else 36]
    assert read(shifted, z, y).votes.shifted is None


@pytest.mark.parametrize("kept", [11, 7])
def test_labels_fit_the_last_logits_kept(kept: int) -> None:
    z, y = torch.randn(4, kept, 50, requires_grad=True), torch.randint(50, (4, 12))
    loss = lambda z, y: shifted(z, y[:, -kept:])  # noqa: E731
    assert read(loss, z, y, labels=y).votes.shifted is True


def test_labels_fit_logits_without_the_last_position() -> None:
    z, y = torch.randn(4, 11, 50, requires_grad=True), torch.randint(50, (4, 12))
    shown = read(lambda z, y: CE(z.flatten(0, 1), y[:, 1:].flatten()), z, y, labels=y)
    assert shown.votes.shifted is True


def test_labels_shifted_by_the_caller_are_the_next_ones() -> None:
    z, y = torch.randn(4, 12, 50, requires_grad=True), torch.randint(50, (4, 12))
    logits = z * 1
    watch = LogitsWatch(logits, labels=y, shifted=True)
    in_place(logits, y).backward()
    assert watch.reading is not None
    assert watch.reading.votes.shifted is True
    assert watch.reading.counted_labels == [48]


def test_few_rows_with_a_gradient_are_searched_for() -> None:
    """A loss outside that leaves 2,990 of 3,000 positions out, and labels nobody saw."""
    z, y = logits_of(50, "usual", rows=3000)
    y = y.where(torch.arange(3000) >= 2990, -100)
    z = z * 1
    watch = LogitsWatch(z)
    CE(z, y).backward(retain_graph=True)
    shown = watch.reading
    assert shown is None or shown.nonzero is None  # after the backward the gradient is gone
    watch, shown = LogitsWatch(z), None

    def at_once(_: Tensor) -> None:
        nonlocal shown
        shown = watch.reading

    z.grad_fn.next_functions[0][0].register_prehook(lambda g: at_once(g[0]))  # type: ignore[union-attr]
    CE(z, y).backward()
    assert shown is not None
    assert (shown.nonzero, shown.rows) == (10, 10)
    found = unit_of(shown, Told())
    assert isinstance(found, Unit)
    assert found.value == 10


def test_a_term_on_ignored_rows_is_noticed() -> None:
    z, y = logits_of(50, "usual", rows=3000)
    y = y.where(torch.arange(3000) % 3 > 0, -100)
    assert isinstance(unit(CE, z, y, labels=y), Unit)
    with_term = lambda z, y: CE(z, y) + 1e-3 * z[y < 0].square().mean()  # noqa: E731
    assert isinstance(unit(with_term, z, y, labels=y), Unknown)


def test_rare_classes_are_among_the_rows_of_few_classes() -> None:
    z, y = logits_of(2, "usual", rows=400)
    y = (torch.arange(400) % 40 == 0).long()
    weights = torch.tensor([1.0, 20.0])
    assert isinstance(unit(lambda z, y: CE(z, y, weight=weights), z, y, labels=y), Unknown)


def test_classes_that_are_ruled_out_are_finite_and_others_are_not() -> None:
    z, y = logits_of(20, "usual")
    with torch.no_grad():
        z[:, 3] = -math.inf
    y = y.where(y != 3, 4)
    assert isinstance(unit(CE, z, y), Unit)
    with torch.no_grad():
        z[5, 2] = math.nan
    assert not read(CE, z, y).finite
    assert isinstance(unit(CE, z, y), Unknown)


def test_a_gradient_of_zero_is_silent() -> None:
    z, y = logits_of(20, "usual")
    shown = read(lambda z, y: CE(z, y) * 0, z, y)
    assert shown.silent
    assert isinstance(unit_of(shown, Told()), Unknown)


# ---- the hooks ---------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 30)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def test_gradients_are_bitwise_those_of_a_run_without() -> None:
    net, x, y = Net(), torch.randn(200, 6), torch.randint(30, (200,))
    gradients = []
    for watched in (False, True):
        net.zero_grad()
        z = net(x)
        if watched:
            watch = LogitsWatch(z, labels=y)
        CE(z, y).backward()
        gradients.append([p.grad.clone() for p in net.parameters()])  # type: ignore[union-attr]
    assert watch.reading is not None
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_nothing_is_kept_after_the_backward() -> None:
    net, x, y = Net(), torch.randn(2000, 6), torch.randint(30, (2000,))
    gc.disable()
    try:
        z = net(x)
        kept: list[weakref.ref[Tensor]] = [weakref.ref(z)]
        watch = LogitsWatch(z)
        z.register_hook(lambda g: kept.append(weakref.ref(g)))
        CE(z, y).backward()
        del z
        assert len(kept) == 2
        assert all(reference() is None for reference in kept)
        held = sum(t.numel() for t in vars(watch).values() if isinstance(t, Tensor))
        assert held < 100
        gone = weakref.ref(watch)
        del watch
        assert gone() is None
    finally:
        gc.enable()


def test_a_forward_without_backward_keeps_no_graph() -> None:
    gc.disable()
    try:
        z = Net()(torch.randn(20, 6))
        gone, watch = weakref.ref(z), LogitsWatch(z)
        del z
        assert gone() is None
        assert watch.reading is None
    finally:
        gc.enable()


class NoWaits(TorchDispatchMode):
    """Refuses what makes the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")
        if name in ("index", "index_put_", "index_put"):
            assert all(i is None or i.dtype == torch.int64 for i in args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("seen", ["labels", "input_ids", "nothing"])
@pytest.mark.parametrize("loss", [shifted, in_place])
def test_no_host_waits_before_the_reading(loss: Loss, seen: str) -> None:
    z, y = torch.randn(20, 60, 50, requires_grad=True), torch.randint(50, (20, 60))
    y[:, 20:40] = -100
    logits = z * 1
    own = loss(logits, y)
    watched = returned_loss(own)
    with NoWaits():
        watch = LogitsWatch(logits, beside=watched, **({} if seen == "nothing" else {seen: y}))
        own.backward()
    assert watch.reading is not None
    assert watch.reading.is_cross_entropy


def test_of_several_backwards_the_first_is_read() -> None:
    z, y = logits_of(50, "usual")
    z = z * 1
    watch = LogitsWatch(z)
    CE(z, y).backward(retain_graph=True)
    (CE(z, y) * 7).backward()
    assert watch.reading is not None
    assert watch.reading.hard.scale == pytest.approx(1 / N, rel=1e-6)


def test_a_float32_copy_that_is_returned_is_looked_through() -> None:
    """As accelerate's: the loss is made of the logits, and the copy sees no gradient."""
    z, y = logits_of(50, "usual", torch.bfloat16)
    logits = z * 1
    watch = LogitsWatch(logits.float())
    CE(logits.float(), y).backward()
    assert watch.reading is not None
    assert watch.reading.coarse
    assert isinstance(unit_of(watch.reading, Told(), Counts(rows=N)), Unit)


def test_a_head_whose_output_is_the_logits_may_hand_over_the_gradient() -> None:
    z, y = logits_of(50, "usual")
    hidden, logits = z * 1, z * 2
    watch = LogitsWatch(logits)
    assert watch.of_same_tensor(logits)
    assert watch.of_same_tensor(logits.to(torch.float64))
    assert not watch.of_same_tensor(hidden)
    assert not watch.of_same_tensor(z)
    seen: list[bool] = []

    def hand_over(gradient: Tensor) -> None:
        watch.see(gradient)
        seen.append(watch.reading is not None)

    logits.register_hook(hand_over)
    CE(logits, y).backward()
    assert seen == [True]


def test_the_loss_and_its_factor_come_with_the_reading() -> None:
    z, y = logits_of(50, "usual")
    logits = z * 1
    own = CE(logits, y)
    loss = returned_loss({"loss": own, "logits": logits})
    assert loss is not None
    watch = LogitsWatch(logits, labels=y, beside=loss)
    (own / 4).backward()
    assert watch.reading is not None
    assert loss.factor == 0.25
    found = unit_of(watch.reading, Told(), Counts(labels=N), loss.factor)
    assert isinstance(found, Unit)
    assert found.value == 4 * N
    mean = MeanLoss()
    assert mean.value() is None
    mean.add(loss, found.value, N)
    assert mean.value() == pytest.approx(own.item(), rel=1e-6)


# ---- what can be watched -----------------------------------------------------------------------


def test_what_can_be_logits_is_found_wherever_it_is() -> None:
    z, hidden = torch.randn(3, 5, requires_grad=True), torch.randn(3, 4, 6, requires_grad=True)

    @dataclass
    class Output:
        scores: Tensor
        hidden_states: tuple[Tensor, ...]

    assert list(watchable(z).values()) == [z]
    assert list(watchable({"loss": z.sum(), "hidden_states": (hidden,), "logits": z})) == [
        "output.logits"
    ]
    assert list(watchable({"other": hidden, "seq_logits": z * 1, "logits": z})) == [
        "output.logits",
        "output.seq_logits",
    ]
    assert list(watchable((z.sum(), [z, hidden]))) == ["output[1][0]", "output[1][1]"]
    assert list(watchable(Output(z, (hidden,)))) == ["output.scores"]
    assert list(watchable({"out": {"logits": z}})) == ["output.out.logits"]
    assert list(watchable({"scores": z, "again": z})) == ["output.scores"]
    for nothing in (z.detach(), z.sum(1), None, z[:, :1], torch.ones(3, 5)):
        assert watchable(nothing) == {}
    with torch.no_grad():
        assert watchable({"logits": z * 1}) == {}


def test_outputs_of_two_scales_are_refused_by_name() -> None:
    z, y = logits_of(50, "usual")
    mean, total = read(CE, z, y), read(RIGHT["sum"].loss, z, y)
    other = read(WRONG["squared error"], z, y)
    assert one_of({}) is None
    assert one_of({"a": other, "b": mean}) == mean
    both = one_of({"a": mean, "b": mean})
    assert isinstance(both, Reading)
    assert (both.hard, both.nonzero) == (mean.hard, 2 * N)
    refused = one_of({"starts": mean, "ends": total})
    assert isinstance(refused, Unknown)
    assert "starts" in refused.message
    assert "ends" in refused.message


# ---- what was told -----------------------------------------------------------------------------


def test_what_is_told_decides_in_order() -> None:
    z, y = logits_of(50, "usual")
    weighted = read(WRONG["class weights"], z, y)
    cases: list[tuple[Told, Counts, float | None, float]] = [
        (Told("sum"), Counts(), None, 1),
        (Told("sum", scale=0.25, amp=8), Counts(), None, 0.5),
        (Told(labels=30), Counts(), None, 30),
        (Told(labels=30), Counts(), 0.5, 60),
        (Told(labels=30, scale=0.1, amp=2), Counts(), None, 150),
        (Told("mean"), Counts(labels=N), None, N),
        (Told("mean"), Counts(items=160), 2.0, 80),
        (Told(scale=0.125, amp=2), Counts(labels=N), None, 4),
    ]
    for told, counts, factor, expected in cases:
        found = unit_of(weighted, told, counts, factor)
        assert isinstance(found, Unit)
        assert found.known.how == TOLD
        assert found.contradicted is None
        assert found.value == pytest.approx(expected, rel=1e-12)
    assert isinstance(unit_of(weighted, Told("mean"), Counts(items=160, labels=N)), Unknown)
    assert isinstance(unit_of(weighted, Told("mean")), Unknown)
    assert isinstance(unit_of(None, Told()), Unknown)
    assert isinstance(unit_of(None, Told(labels=3), factor=math.inf), Unknown)


def test_a_proven_cross_entropy_contradicts_what_was_told() -> None:
    z, y = logits_of(50, "usual")
    shown = read(CE, z, y)
    cases = [(Told("sum"), 1.0), (Told(labels=30), float(N)), (Told("mean", scale=0.5), float(N))]
    for told, value in cases:
        found = unit_of(shown, told, Counts(labels=N))
        assert isinstance(found, Unit)
        assert found.value == pytest.approx(value, rel=1e-6)
        assert found.contradicted == pytest.approx(N, rel=1e-5)
    for told in (
        Told(),
        Told("mean"),
        Told(labels=N),
        Told("sum", scale=1 / N),
        Told("mean", scale=1.0),
    ):
        found = unit_of(shown, told, Counts(labels=N))
        assert isinstance(found, Unit)
        assert found.contradicted is None


def test_the_likelier_of_two_candidates_is_taken_where_rounding_hides_the_other() -> None:
    z, y = logits_of(50, "usual", torch.bfloat16, rows=2000)
    shown = read(lambda z, y: CE(z.float(), y), z, y)
    found = unit_of(shown, Told(), Counts(labels=2000, rows=2001))
    assert isinstance(found, Unit)
    assert found.value == 2000


@given(st.lists(st.booleans(), min_size=1, max_size=300), st.integers(1, 40))
@settings(deadline=None)
def test_rows_are_taken_evenly_and_each_once(mask: list[bool], count: int) -> None:
    index, exists = evenly(torch.tensor(mask), count)
    chosen = index[exists].tolist()
    assert len(chosen) == len(set(chosen)) == min(count, sum(mask))
    assert all(mask[i] for i in chosen)
    ranks = [sum(mask[:i]) for i in chosen]
    gaps = [b - a for a, b in pairwise(ranks)]
    assert not gaps or max(gaps) - min(gaps) <= 1
