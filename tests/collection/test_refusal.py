"""A refusal inside a hook is raised in the loop, or handed to the caller, who is asked once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvfast.collection.config import CollectConfig
from curvfast.collection.curvature import Curvature
from curvfast.collection.refusal import Refusals
from curvfast.errors import CoverageError, CurvfastError, InputError


def penalised(model: nn.Module) -> None:
    """Take a step whose loss goes backward twice."""
    loss = model(torch.randn(4, 3)).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()


def measured(**options: object) -> tuple[nn.Module, Curvature]:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    config = CollectConfig(layers="all", loss_reduction="sum")
    return model, Curvature(model, config, "all", **options)


def test_without_a_handler_it_is_raised_in_the_loop() -> None:
    model, _ = measured()
    with pytest.raises(CoverageError, match="second backward"):
        penalised(model)


def test_with_one_the_loop_goes_on_with_the_gradients_it_would_have() -> None:
    found: list[CurvfastError] = []
    model, curvature = measured(on_error=found.append)
    twin = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    twin.load_state_dict(model.state_dict())
    for each in (model, twin):
        torch.manual_seed(1)
        for _ in range(3):
            penalised(each)
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(own.grad, other.grad)
    # The other layers, and later steps, would have been refused too.
    (error,) = found
    curvature.close()
    for _ in range(2):
        with pytest.raises(CoverageError, match="second backward") as caught:
            curvature.factors()
        assert caught.value is error


def test_a_noted_refusal_holds_no_frames_of_the_step() -> None:
    refusals = Refusals(lambda error: None)

    def hook() -> None:
        try:
            raise RuntimeError("gone")
        except RuntimeError as error:
            raise InputError("no") from error

    assert refusals.run(hook, aside=None) is None
    error = refusals.error
    assert error is not None
    assert (error.__traceback__, error.__cause__, error.__context__) == (None, None, None)
    assert refusals.run(lambda: 3, aside=4) == 4
    with pytest.raises(InputError):
        refusals.check()


def test_other_errors_are_the_loops_own() -> None:
    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Refusals(lambda error: None).run(broken, aside=None)
