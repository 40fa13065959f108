"""Packing and unpacking of symmetric sums: the native core against torch's copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from curvfast import ops

WIDTHS = (256, 768, 1024, 2048, 4096)
OPERATIONS = {
    "pack": lambda matrix, packed: ops.pack(matrix, packed.width),
    "dense": lambda matrix, packed: packed.dense(),
    "mirror": lambda matrix, packed: ops.mirror_(matrix),
    "scale": lambda matrix, packed: packed.scale_(1.0),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("d", WIDTHS)
def test_packed_sum(race: Any, d: int, operation: str) -> None:
    matrix = torch.randn(d, d)
    matrix = matrix + matrix.T
    packed = ops.pack(matrix, ops.new_sum(d).width)
    run = OPERATIONS[operation]

    def by(backend: str) -> Any:
        with ops.use_backend(backend):
            return run(matrix, packed)

    by("native"), by("torch")
    assert torch.equal(packed.dense(), matrix)
    race(lambda: by("native"), lambda: by("torch"), rounds=40 if d < 3000 else 15)
