"""What the tests of rivals share: rivals small enough for a tiny model, and its text."""

from __future__ import annotations

from typing import Any

import torch
from cases import VOCABULARY, token_batches
from torch.func import functional_call

import curvfast
from curvfast import Passage
from curvfast.baselines import (
    NPO,
    BalancedSubnet,
    Durable,
    GradientAscent,
    Greedy,
    RandomPairs,
    Subnet,
)
from curvfast.baselines.baseline import ForgetTask, choose
from curvfast.model.rows import IGNORED_LABEL

MASKING = [
    BalancedSubnet(ratio=0.03, epochs=2, batch_size=3),
    Subnet(ratio=0.03, epochs=2, batch_size=3),
    Durable(ratio=0.03, batch_size=3),
]
MOVING = [
    GradientAscent(learning_rate=1e-3, epochs=2, batch_size=3),
    NPO(learning_rate=1e-3, epochs=2, batch_size=3),
]
GREEDY = Greedy(ratio=0.002, at_once=5, batch_size=3)
SUPERVISED = [*MASKING, *MOVING, GREEDY]
RANDOM = [r for r in SUPERVISED if not isinstance(r, Durable)]
Model = torch.nn.Module


def kind(rival: Any) -> str:
    return type(rival).__name__


def passages(count: int = 5) -> list[Passage]:
    """Passages of unequal lengths."""
    return [
        Passage(
            tuple(torch.randint(1, VOCABULARY, (4 + i,)).tolist()),
            tuple(torch.randint(1, VOCABULARY, (3 + i % 2,)).tolist()),
        )
        for i in range(count)
    ]


def state(model: Model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(model: Model, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def begin(
    model: Model, memorized: Any, clean: Any, layers: Any, *, scored: str, balanced: bool
) -> ForgetTask:
    """What a supervised rival works on."""
    rival = BalancedSubnet(scored=scored, clean_weight=0.5 if balanced else 0)
    return ForgetTask(choose(model, layers), *rival._read(memorized, clean))


def forget(rival: Any, model: Model, seed: int = 0, layers: Any = "mlp") -> Any:
    torch.manual_seed(5)
    return rival.forget(model, passages(), token_batches(), layers, seed=seed, progress=False)


def likelihoods(net: Model, examples: Any, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """log p of the scored tokens of each example, one by one, with weights in place of its own."""
    found = []
    for example in examples:
        out = functional_call(net, weights, kwargs={"input_ids": example.tokens[None]})
        logp = out.logits[0, :-1].log_softmax(-1)
        scored = (example.targets[1:] != IGNORED_LABEL).nonzero()[:, 0]
        found.append(sum(logp[i, example.targets[i + 1]] for i in scored.tolist()))
    return torch.stack(found)


def losses_of(net: Model, examples: Any, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    counts = torch.tensor([int((e.targets != IGNORED_LABEL).sum()) for e in examples])
    return -(likelihoods(net, examples, weights) / counts).mean()


def random_pairs(net: Model) -> RandomPairs:
    basis = curvfast.collect_from(net, token_batches(sizes=(40, 41)), progress=False).eigh()
    return RandomPairs(basis, basis.keep(fraction=0.5))
