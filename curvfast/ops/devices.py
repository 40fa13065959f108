"""Device properties that other modules branch on, in one place so that tests can replace them.

What only a CUDA device has, such as streams, events and pinned memory, is asked where it is used.
"""

from __future__ import annotations

import torch


def on_accelerator(device: torch.device) -> bool:
    """Return whether work on a device runs apart from the CPU: its values have to be waited for."""
    return device.type != "cpu"


def takes_kernels(device: torch.device) -> bool:
    """Return whether second moments on a device are the Triton kernels' by default."""
    return device.type == "cuda"
