"""Cost of a batch of collect_from: products, memory, and time over a plain step.

The model is the one peers are compared on (``peers/cases.py``): Llama, 4 layers, hidden 256, MLP
1024, batches of 8 × 128, every MLP linear. ``make bench-peers`` holds other libraries against it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import live_bytes, products
from peers.cases import CASES
from torch import nn
from torch.nn.functional import cross_entropy

import curvfast

CASE = CASES["peers"]
ROWS = CASE.sequences * (CASE.length - 1)


def ours(net: nn.Module, data: list[dict[str, torch.Tensor]]) -> Any:
    return curvfast.collect_from(net, data, labels="sampled", progress=False)


def plain(net: nn.Module, data: list[dict[str, torch.Tensor]]) -> None:
    """A forward and a whole backward of each batch, and no curvature."""
    for batch in data:
        logits = net(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        cross_entropy(logits, batch["input_ids"][:, 1:].flatten(), reduction="sum").backward()
        net.zero_grad()


@pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")
def test_collect_from(race: Any, benchmark: Any) -> None:
    """Time against a plain step that computes every gradient and no curvature."""
    net, data = CASE.model(), CASE.data()
    one = data[:1]
    benchmark.extra_info["gflop_a_batch"] = products(lambda: ours(net, one)) / 1e9
    benchmark.extra_info["gflop_a_batch_plain"] = products(lambda: plain(net, one)) / 1e9
    benchmark.extra_info["live_peak_mb"] = live_bytes(lambda: ours(net, data)) / 1e6
    factors = ours(net, data)
    assert factors.rows == len(data) * ROWS
    race(lambda: ours(net, data), lambda: plain(net, data), rounds=4)


@pytest.mark.parametrize("part", [None, 1 / 4, 1 / 16], ids=["all-rows", "quarter", "sixteenth"])
def test_what_collecting_adds_to_a_training_step(
    race: Any, benchmark: Any, part: float | None
) -> None:
    """The ratio is of the plain step's time: 1 / (1 + overhead)."""
    net, data = CASE.model().train(), CASE.data(2)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        for batch in data:
            net(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()

    def collecting() -> curvfast.Curvature:
        with curvfast.collect(net, rows_per_step=part) as curvature:
            step()
        return curvature

    covered = collecting().coverage().covered["model.layers.0.mlp.up_proj.weight"]
    assert covered == len(data) * (ROWS if part is None else round(part * ROWS))
    benchmark.extra_info["gflop_a_batch"] = products(collecting) / len(data) / 1e9
    benchmark.extra_info["gflop_a_batch_plain"] = products(step) / len(data) / 1e9
    race(collecting, step, rounds=7)
