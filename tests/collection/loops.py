"""Loops that people write, and what of them counts: recorded without a hook."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from oracle import Record, assert_equal_factors
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import curvfast

Keep = Callable[[str, torch.Size], Tensor]


def everything(_: str, shape: torch.Size) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def only(keep: Tensor) -> Keep:
    return lambda name, shape: keep


@dataclass(frozen=True)
class Step:
    """A batch: the loss the loop goes down, the summed loss, and which rows count."""

    loss: Callable[[], Tensor]
    summed: Callable[[], Tensor]
    keep: Keep = everything
    tell: Callable[[Any], None] = lambda curvature: None


@dataclass(frozen=True)
class Loop:
    model: nn.Module
    layers: list[str]
    steps: list[Step]
    options: Mapping[str, Any] = field(default_factory=dict)
    twin: nn.Module | None = None
    """The module that the summed losses run through, where it is another than the model."""


def measured(loop: Loop, before: Callable[[Any, Step], None] | None = None, **options: Any) -> Any:
    with curvfast.collect(loop.model, loop.layers, **{**loop.options, **options}) as curvature:
        for step in loop.steps:
            step.tell(curvature)
            if before is not None:
                before(curvature, step)
            step.loss().backward()
    return curvature.factors()


def counted(loop: Loop) -> dict[str, Record]:
    """Record the rows that count with the modules' own forwards replaced: no hook is involved."""
    model = loop.twin or loop.model
    records = {name: Record() for name in loop.layers}
    modules = {name: model.get_submodule(name) for name in loop.layers}
    for step in loop.steps:
        taps: list[tuple[str, Tensor, Tensor]] = []
        for name, module in modules.items():
            module.forward = _tapped(module, name, taps)
        try:
            step.summed().backward()
        finally:
            for module in modules.values():
                del module.forward
        for name, x, y in taps:
            keep = step.keep(name, x.shape[:-1])
            records[name].a.append(x.detach()[keep].double())
            records[name].g.append(y.grad[keep].double())
    model.zero_grad()
    return records


def _tapped(module: nn.Module, name: str, taps: list[Any]) -> Callable[[Tensor], Any]:
    original = type(module).forward

    def forward(x: Tensor) -> Any:
        output = original(module, x)
        y = output[0] if isinstance(output, tuple) else output
        y.retain_grad()
        taps.append((name, x, y))
        # What is written in place afterwards is written to a copy.
        return (y.clone(), *output[1:]) if isinstance(output, tuple) else y.clone()

    return forward


def assert_exact(loop: Loop, **options: Any) -> None:
    assert_equal_factors(measured(loop, **options), counted(loop))


def tokens(rows: int = 3, length: int = 7, real: tuple[int, ...] = (4, 7, 6)) -> Any:
    """Return ids, a mask of right padding, labels; rows end at different places."""
    ids = torch.randint(3, 50, (rows, length))
    mask = (torch.arange(length) < torch.tensor(real[:rows])[:, None]).long()
    return ids, mask, ids.masked_fill(mask == 0, -100)


def not_last(mask: Tensor) -> Tensor:
    return mask.bool() & (mask.flip(-1).cumsum(-1).flip(-1) > 1)


def shifted(logits: Tensor, labels: Tensor, reduction: str = "sum") -> Tensor:
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction=reduction)


def placed(logits: Tensor, labels: Tensor, reduction: str = "sum", **options: Any) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=reduction, **options)


class Net(nn.Module):
    def __init__(self, out: int, *, squeeze: bool = False, axis: int = -1) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, out)
        self.squeeze, self.axis = squeeze, axis

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.up(x).relu())
        return y.squeeze(-1) if self.squeeze else y.movedim(-1, self.axis)


Loss = Callable[..., Tensor]


def fit(
    model: nn.Module, loss: Loss, batches: list[tuple[Tensor, Tensor]], factor: float = 1.0
) -> Loop:
    """Return a loop that averages ``loss``, times a factor, without a word on either."""

    def step(x: Tensor, y: Tensor) -> Step:
        return Step(
            lambda: factor * loss(model(x), y, reduction="mean"),
            lambda: loss(model(x), y, reduction="sum"),
        )

    return Loop(model, ["up", "down"], [step(*batch) for batch in batches])


def labelled(*shapes: tuple[int, ...], classes: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(*shape, 6), torch.randint(classes, shape)) for shape in shapes]


BERT: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 24, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,
}  # fmt: skip
