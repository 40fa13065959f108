"""One batch into one running sum: the block triangle against torch's dense ``addmm_``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from curvfast import ops

# Widths of real layers: tiny test models, GPT-2 (768, 3072), Llama-1B (2048, 4096 in q·k·v·o).
WIDTHS = (64, 128, 192, 256, 384, 512, 576, 768, 1024, 1536, 2048, 3072, 4096)
ROWS = 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("d", WIDTHS)
def test_second_moment(race: Any, d: int, dtype: torch.dtype) -> None:
    x = torch.randn(ROWS, d).to(dtype)
    mine, dense = ops.new_sum(d), torch.zeros(d, d)

    def ours() -> None:
        ops.second_moment_(mine, x)

    def theirs() -> None:
        rows = x.float()
        dense.addmm_(rows.T, rows)

    ours(), theirs()
    torch.testing.assert_close(mine.dense(), dense, rtol=1e-4, atol=1e-3)
    race(ours, theirs, rounds=15 if d < 3000 else 5)
