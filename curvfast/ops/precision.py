"""Float32 products that are float32: not TF32 nor bfloat16, whatever the training allows itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

EXACT, INHERITED = "ieee", "none"


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply float32 matrices exactly inside the block, as before after it."""
    matmuls: list[Any] = [
        torch.backends.cuda.matmul,
        getattr(torch.backends.mkldnn, "matmul", None),
    ]
    if not all(hasattr(each, "fp32_precision") for each in matmuls):
        # Before torch 2.9 there is one setting for all.
        allowed = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(allowed)
        return
    settings = [each.fp32_precision for each in matmuls]
    try:
        for each in matmuls:
            each.fp32_precision = EXACT
        yield
    finally:
        for each, setting in zip(matmuls, settings, strict=True):
            # A setting that came from torch.backends.fp32_precision must go on following it.
            each.fp32_precision = INHERITED
            if each.fp32_precision != setting:
                each.fp32_precision = setting
