"""What a batch of collect_from costs: products executed, memory held, time over a plain step.

The model is the one peers are compared on: Llama, 4 layers, hidden 256, MLP 1024, batches of
8 × 128, every MLP linear. kronfluence is measured beside it where it is installed
(``pip install --no-deps kronfluence einconv accelerate``).
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, mm_flop

import curvfast

BATCHES, ROWS, LENGTH, VOCABULARY = 8, 8, 128, 2048


def model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=VOCABULARY, max_position_embeddings=LENGTH,
        attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def batches(count: int = BATCHES) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = (ROWS, LENGTH)
    return [
        {"input_ids": torch.randint(VOCABULARY, shape, generator=generator)} for _ in range(count)
    ]


def ours(net: nn.Module, data: list[dict[str, torch.Tensor]]) -> Any:
    return curvfast.collect_from(net, data, labels="sampled", progress=False)


def plain(net: nn.Module, data: list[dict[str, torch.Tensor]]) -> None:
    """A forward and a whole backward of each batch, and no curvature."""
    for batch in data:
        logits = net(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        cross_entropy(logits, batch["input_ids"][:, 1:].flatten(), reduction="sum").backward()
        net.zero_grad()


def kronfluence(net: nn.Module, data: list[dict[str, torch.Tensor]]) -> Callable[[], None]:
    """Return kronfluence's covariance fit of the same model and data."""
    import contextlib
    import tempfile

    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.task import Task

    class Language(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Any:
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
            logits = logits.flatten(0, 1)
            labels = batch["input_ids"][:, 1:].flatten()
            if sample:
                with torch.no_grad():
                    labels = torch.multinomial(logits.softmax(-1), 1).flatten()
            return cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: Any) -> Any:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return [n for n, m in net.named_modules() if isinstance(m, nn.Linear) and "mlp" in n]

    task = Language()
    analyzer = Analyzer(
        "cost", prepare_model(net, task), task, cpu=True, disable_tqdm=True,
        disable_model_save=True, output_dir=tempfile.mkdtemp(), log_main_process_only=True,
    )  # fmt: skip
    rows = [{"input_ids": row} for batch in data for row in batch["input_ids"]]

    def run() -> None:
        with contextlib.redirect_stdout(None):
            analyzer.fit_covariance_matrices(
                "cost", rows, per_device_batch_size=ROWS, overwrite_output_dir=True
            )

    return run


def products(run: Callable[[], Any]) -> float:
    """Return the floating-point operations of every matrix product, in-place ones included."""

    def in_place(_out: Any, a: Any, b: Any, *rest: Any, **options: Any) -> int:
        return mm_flop(a, b)

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as count:
        run()
    return float(count.get_total_flops())


def live_bytes(run: Callable[[], Any]) -> int:
    """Return the most bytes of tensors alive at once that ``run`` made."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes))


@pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")
def test_collect_from(race: Any, benchmark: Any) -> None:
    """Time against a plain step that computes every gradient and no curvature."""
    net, data = model(), batches()
    one = data[:1]
    benchmark.extra_info["gflop_a_batch"] = products(lambda: ours(net, one)) / 1e9
    benchmark.extra_info["gflop_a_batch_plain"] = products(lambda: plain(net, one)) / 1e9
    benchmark.extra_info["live_peak_mb"] = live_bytes(lambda: ours(net, data)) / 1e6
    factors = ours(net, data)
    assert factors.rows == BATCHES * ROWS * (LENGTH - 1)
    race(lambda: ours(net, data), lambda: plain(net, data), rounds=4)


@pytest.mark.skipif(importlib.util.find_spec("kronfluence") is None, reason="no kronfluence here")
def test_collect_from_against_kronfluence(race: Any, benchmark: Any) -> None:
    net, twin, data = model(), model(), batches()
    rival = kronfluence(twin, data)
    benchmark.extra_info["live_peak_mb"] = live_bytes(lambda: ours(net, data)) / 1e6
    benchmark.extra_info["live_peak_mb_kronfluence"] = live_bytes(rival) / 1e6
    race(lambda: ours(net, data), rival, rounds=4)


@pytest.mark.parametrize("part", [None, 1 / 4, 1 / 16], ids=["all-rows", "quarter", "sixteenth"])
def test_what_collecting_adds_to_a_training_step(
    race: Any, benchmark: Any, part: float | None
) -> None:
    """The ratio is of the plain step's time: 1 / (1 + overhead)."""
    net, data = model().train(), batches(2)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        for batch in data:
            net(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()

    def collecting() -> curvfast.Curvature:
        with curvfast.collect(net, rows_per_step=part) as curvature:
            step()
        return curvature

    rows = ROWS * (LENGTH - 1)
    covered = collecting().coverage().covered["model.layers.0.mlp.up_proj.weight"]
    assert covered == len(data) * (rows if part is None else round(part * rows))
    benchmark.extra_info["gflop_a_batch"] = products(collecting) / len(data) / 1e9
    benchmark.extra_info["gflop_a_batch_plain"] = products(step) / len(data) / 1e9
    race(collecting, step, rounds=7)
