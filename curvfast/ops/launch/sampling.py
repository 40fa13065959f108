"""Host side of the sampled-gradient kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from curvfast.ops.launch.availability import interpreting, launching, refuses_device

_BLOCK, _INTERPRETED_BLOCK = 4096, 256
_LARGEST_SEED = 2**63 - 1


def refusal(logits: Tensor) -> str | None:
    """Return the reason why the kernel cannot take these logits, or None."""
    if logits.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the kernel takes bfloat16, float16 and float32 logits, not {logits.dtype}"
    if logits.stride(-1) != 1:
        return "the kernel needs each row's logits side by side in memory"
    return refuses_device(logits.device)


def sampled_gradient_(logits: Tensor, rows: Tensor | None, generator: torch.Generator) -> Tensor:
    """Draw labels and overwrite logits, one program per row; the seed stays on the device."""
    from curvfast.kernels.sampled_gradient import sampled_gradient

    count, classes = logits.shape
    device = logits.device
    labels = torch.empty(count, dtype=torch.long, device=device)
    counts = torch.ones(count, dtype=torch.int8, device=device)
    if rows is not None:
        counts.zero_()[rows] = 1
    seed = torch.randint(_LARGEST_SEED, (1,), generator=generator, device=device)
    if count:
        block = _INTERPRETED_BLOCK if interpreting() else _BLOCK
        with launching(logits):
            sampled_gradient[(count,)](
                logits, counts, labels, seed, classes, logits.stride(0), BLOCK=block, num_warps=8
            )
        # Autograd does not see a kernel's writes; this bumps the version counter.
        torch.autograd.graph.increment_version(logits)
    return labels
