"""A context of exact float32 products, whatever reduced precision the training allows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

EXACT, INHERITED = "ieee", "none"


@contextmanager
def exact_products() -> Iterator[None]:
    """Disable TF32 and bfloat16 for float32 products inside the block, and restore after it."""
    matmuls: list[Any] = [
        torch.backends.cuda.matmul,
        getattr(torch.backends.mkldnn, "matmul", None),
    ]
    if not all(hasattr(each, "fp32_precision") for each in matmuls):
        # Before torch 2.9 there is a single setting.
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
            # A setting inherited from torch.backends.fp32_precision must keep following it.
            each.fp32_precision = INHERITED
            if each.fp32_precision != setting:
                each.fp32_precision = setting
