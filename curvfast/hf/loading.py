"""Loading of causal language models by folder or hub id."""

from __future__ import annotations

from typing import Any

import torch

from curvfast.errors import InputError, first_line


def load_causal_lm(name: str, *, dtype: str, device: str) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        name: A folder, or a name of the hub (read from its cache where there is no network).
        dtype: Dtype of the weights, such as ``"bfloat16"``.
        device: Device of the weights.

    Returns:
        The model in eval mode, and the tokenizer.

    Raises:
        InputError: If there is no such model, dtype or device.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wanted = getattr(torch, dtype, None)
    if not isinstance(wanted, torch.dtype) or not wanted.is_floating_point:
        raise InputError(f"dtype={dtype!r}: pass float32, bfloat16 or float16")
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=wanted)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"no causal language model could be loaded from {name!r}: {first_line(error)}"
        ) from error
    try:
        return model.to(device).eval(), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={device!r}: {first_line(error)}") from error
