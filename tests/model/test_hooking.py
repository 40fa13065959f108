"""Hooks of an object: none on its copies, none in its pickles, and those of others untouched."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import curvfast
from curvfast.model.hooking import in_transform, others_on_output, watch_forward

DICTS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def entries(net: nn.Module) -> int:
    return sum(len(getattr(module, name)) for module in net.modules() for name in DICTS)


def saved(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    assert b"curvfast" not in file.getvalue()
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(net: nn.Module) -> nn.Module:
    text = pickle.dumps(net)
    assert b"curvfast" not in text
    return pickle.loads(text)


def pickled_in_python(net: nn.Module) -> nn.Module:
    return pickle.loads(pickle._dumps(net, protocol=2))


COPIES: list[Callable[[nn.Module], nn.Module]] = [
    copy.deepcopy, saved, pickled, pickled_in_python, AveragedModel,
    lambda net: copy.deepcopy(copy.copy(net)),
]  # fmt: skip


@pytest.fixture
def watched() -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    net, ran = model(), []
    handles = [
        watch_forward(
            module, lambda m, *_: ran.append(m), before=lambda m, *_: ran.append(m), always=True
        )
        for module in (net, net[0])
    ]
    yield net, ran
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("made", COPIES)
def test_a_copy_has_no_hook_and_runs_none(watched, made) -> None:
    net, ran = watched
    again = made(net)
    assert entries(again) == 0
    again(torch.randn(2, 6))
    assert not ran
    net(torch.randn(2, 6))
    assert ran == [net, net[0], net[0], net]


def test_a_shallow_copy_shares_the_hooks_and_runs_none(watched) -> None:
    net, ran = watched
    copy.copy(net[0])(torch.randn(2, 6))
    assert not ran


@pytest.mark.parametrize("made", COPIES[:4])
def test_hooks_of_others_are_copied_and_their_handles_work(made) -> None:
    net = model()
    kept = net[0].register_forward_hook(print, with_kwargs=True)
    ours = watch_forward(net[0], lambda *_: None)
    later = net[0].register_forward_pre_hook(repr)
    again = made(net)
    assert list(again[0]._forward_hooks.values()) == [print]
    assert list(again[0]._forward_pre_hooks.values()) == [repr]
    assert list(again[0]._forward_hooks_with_kwargs.values()) == [True]
    assert others_on_output(net[0]) == 1
    kept.remove()
    later.remove()
    assert others_on_output(net[0]) == 0
    ours.remove()
    assert entries(net) == 0


def test_a_hook_of_others_that_holds_the_model_holds_its_copy() -> None:
    class Holding:
        def __init__(self, net: nn.Module) -> None:
            self.net = net

        def __call__(self, *_: object) -> None:
            pass

    net = model()
    net[0].register_forward_hook(Holding(net))
    ours = watch_forward(net[0], lambda *_: None)
    again = copy.deepcopy(net)
    (hook,) = again[0]._forward_hooks.values()
    assert hook.net is again
    ours.remove()


def test_with_the_last_hook_nothing_is_left_on_the_dicts() -> None:
    net = model()
    handles = [watch_forward(net, lambda *_: None, before=lambda *_: None) for _ in range(2)]
    handles[0].remove()
    assert entries(copy.deepcopy(net)) == 0
    handles[1].remove()
    assert not any(vars(getattr(net, name)) for name in DICTS)
    handles[1].remove()


def test_a_forward_that_raises_is_told_of() -> None:
    net, seen = model(), []
    handle = watch_forward(net, lambda *call: seen.append(call[-1]), always=True)
    with pytest.raises(RuntimeError):
        net(torch.randn(2, 5))
    assert seen == [None]
    handle.remove()


@pytest.mark.parametrize("inside", [copy.deepcopy, AveragedModel, saved])
def test_layers_of_a_copy_made_inside_a_block_count_nothing(inside) -> None:
    net = model()
    layer = net[0]
    x = torch.randn(9, 6)
    with curvfast.collect(net, "0", loss_reduction="sum") as curvature:
        net(x).sum().backward()
        twin = inside(layer)
        assert entries(twin) == 0
        twin(x).sum().backward()
        assert curvature.coverage().covered["0.weight"] == 9
    assert curvature.factors()["0"].rows_g == 9


def test_transforms_are_known() -> None:
    assert not in_transform()
    within = []

    def f(x: torch.Tensor) -> torch.Tensor:
        within.append(in_transform())
        return x.sum()

    torch.func.vmap(f)(torch.ones(2, 3))
    torch.func.grad(f)(torch.ones(3))
    torch.func.jvp(f, (torch.ones(3),), (torch.ones(3),))
    with torch.autograd.forward_ad.dual_level():
        f(torch.ones(3))
    assert within == [True] * 4
    assert not in_transform()
