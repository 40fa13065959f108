"""What collecting costs, counted: matrix products, and memory that stays with the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import products
from torch import nn

import curvfast
from curvfast import ops
from curvfast.ops import TriangularSum, blocked_second_moment
from curvfast.ops.native import second_moment


@pytest.fixture
def benchmark_model() -> nn.Module:
    """The model peers are compared on."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=4,
            vocab_size=2048,
            attn_implementation="eager",
        )
    ).eval()


@pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")
def test_a_batch_costs_less_than_in_any_peer(benchmark_model: nn.Module) -> None:
    tokens = torch.randint(2048, (8, 128))
    found = products(lambda: curvfast.collect_from(benchmark_model, [tokens], progress=False))
    forward = products(lambda: benchmark_model(input_ids=tokens).logits)
    # The leanest peer: 46.4 GFLOP. Half the factor products is the least there is.
    rows, dense = 8 * 127, sum(4 * 2 * d * d for d in (256, 1024, 256, 256, 1024, 1024, 256))
    assert forward + rows * dense / 4 < found <= 41e9


WIDTHS = [100, 255, 256, 576, 1024, 1536, 4096]


def moment_products(d: int, backend: str) -> float:
    """What a backend multiplies for 8 rows of d features."""
    x, out = torch.randn(8, d), ops.new_sum(d)
    with ops.use_backend(backend):
        return products(lambda: ops.second_moment_(out, x))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("d", WIDTHS)
def test_packed_rows_never_cost_more_than_a_dense_update(d: int) -> None:
    # Packed strips are 32 wide, and never more than the dense product.
    found = moment_products(d, "native")
    assert 8 * d * (d + 1) <= found <= 8 * min((d + 31) * (d + 63), 2 * d * d)
    assert moment_products(d, "auto") == found


@pytest.mark.parametrize("d", WIDTHS)
def test_torchs_products_never_cost_more_than_a_dense_update(d: int) -> None:
    share = (1 + blocked_second_moment.diagonal_step(d) / d) / 2
    assert moment_products(d, "torch") == pytest.approx(2 * 8 * d * d * share, rel=0.03)
    assert moment_products(d, "torch") <= 2 * 8 * d * d


@pytest.mark.parametrize("d", WIDTHS)
def test_a_second_moment_costs_unasked_what_its_path_does(d: int) -> None:
    path = "native" if second_moment.packs(torch.float32, d) else "torch"
    assert moment_products(d, "auto") == moment_products(d, path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_cast_a_chunk_at_a_time(dtype: torch.dtype, monkeypatch: Any) -> None:
    sizes = []
    original = torch.empty

    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = original(*args, **kwargs)
        sizes.append(made.numel())
        return made

    monkeypatch.setattr(torch, "empty", empty)
    x = torch.ones(9000, 300, dtype=dtype)
    with ops.use_backend("torch"):
        ops.second_moment_(TriangularSum.zeros(300, 128), x, rows=torch.arange(0, 9000, 2))
    assert sizes == [blocked_second_moment.chunk_rows(300) * 300]
    assert sizes[0] < 9000 * 300 / 4
