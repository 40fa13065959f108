"""Availability of the kernels: on this machine, and on the device of a tensor."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from curvfast.ops.registry import unless_named

_OLDEST = (8, 0)
# What the interpreter pretends to be: every path of the newest kernels is then taken.
_INTERPRETED = 90
_by_name = unless_named("triton", "its interpreter is slow")


@cache
def interpreting() -> bool:
    """Return whether TRITON_INTERPRET=1 selected Triton's interpreter at the first call."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def unavailable() -> str | None:
    """Return why no kernel can run on this machine, or None."""
    if not _installed():
        return "triton is not installed (pip install 'curvfast[gpu]')"
    if interpreting() or torch.cuda.is_available():
        return None
    return "there is no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"


def refuses_device(device: torch.device) -> str | None:
    """Return why the kernels cannot run on a device, or None."""
    if interpreting():
        return _by_name()
    if device.type != "cuda":
        return f"the kernels need CUDA tensors, this one is on {device.type}"
    if torch.cuda.get_device_capability(device) < _OLDEST:
        return "the kernels need compute capability 8.0 or later"
    return None


def launching(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which kernels are launched where x is: on its device, and its stream."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def arch(x: Tensor) -> int:
    """Return the entry of the tile tables for the device of x."""
    if x.device.type != "cuda":
        return _INTERPRETED
    from curvfast.kernels.tiling import architecture

    return int(architecture(torch.cuda.get_device_capability(x.device)))
