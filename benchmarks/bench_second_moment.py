"""Benchmarks of the second moment, one triangle, against dense products and BLAS's ``ssyrk``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from curvfast import ops

# Widths of real layers: tiny test models, GPT-2 (768, 3072), Llama-1B (2048, 4096 in q·k·v·o).
WIDTHS = (64, 128, 192, 256, 512, 768, 1024, 1408, 2048, 4096)
ROWS = 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("d", WIDTHS)
def test_second_moment(race: Any, d: int, dtype: torch.dtype) -> None:
    """Against ``addmm_`` into a dense sum, which rows of bfloat16 are cast for."""
    x = torch.randn(ROWS, d).to(dtype)
    mine, dense = ops.new_sum(d), torch.zeros(d, d)

    def ours() -> None:
        ops.second_moment_(mine, x)

    def theirs() -> None:
        rows = x.float()
        dense.addmm_(rows.T, rows)

    ours(), theirs()
    torch.testing.assert_close(mine.dense(), dense, rtol=1e-4, atol=1e-3)
    race(ours, theirs)


@pytest.mark.parametrize("d", [256, 1024, 2048])
def test_second_moment_beside_numpy_and_blas(race: Any, d: int) -> None:
    """numpy makes a whole product and adds it; scipy's ``ssyrk`` makes one triangle, in place."""
    blas = pytest.importorskip("scipy.linalg.blas")
    x = torch.randn(ROWS, d)
    rows, mine = x.numpy(), ops.new_sum(d)
    sums = {"numpy": torch.zeros(d, d).numpy(), "ssyrk": torch.zeros(d, d).numpy().T}

    def numpy() -> None:
        sums["numpy"] += rows.T @ rows

    def ssyrk() -> None:
        # Fortran's order of rows is their transpose: no copy is made of either.
        sums["ssyrk"] = blas.ssyrk(1.0, rows.T, 1.0, sums["ssyrk"], overwrite_c=1)

    ops.second_moment_(mine, x)
    numpy(), ssyrk()
    expected = mine.dense()
    torch.testing.assert_close(expected, torch.from_numpy(sums["numpy"]), rtol=1e-4, atol=1e-3)
    triangle = torch.from_numpy(sums["ssyrk"].copy()).triu()
    torch.testing.assert_close(expected.triu(), triangle, rtol=1e-4, atol=1e-3)
    for rival in (numpy, ssyrk):
        # Each has threads of its own, which wait by spinning: they are given time to stop.
        race(lambda: ops.second_moment_(mine, x), rival, rival=rival.__name__, pause=0.3)
