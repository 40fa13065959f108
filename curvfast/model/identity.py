"""Facts about a model and its environment, and whether it can be saved as it is."""

from __future__ import annotations

import platform
import sys
from typing import Any

import torch
from torch import nn

from curvfast._version import __version__
from curvfast.distributed import is_sharded_model
from curvfast.errors import InputError


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of data parallelism and ``torch.compile``."""
    while True:
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def without_ddp(model: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel, which expects gradients of weights."""
    inner = getattr(model, "module", None)
    if type(model).__name__ == "DistributedDataParallel" and isinstance(inner, nn.Module):
        return inner
    return model


def is_causal_lm(model: nn.Module) -> bool:
    """Return whether ``model`` is one of transformers' decoder-only language models.

    Recognised by class names, so that transformers is not imported for models of other libraries.
    """
    inner = unwrap(model)
    config = getattr(inner, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return False
    # peft keeps the model it wraps behind this method.
    base = getattr(inner, "get_base_model", None)
    inner = base() if callable(base) else inner
    names = (cls.__name__ for cls in type(inner).__mro__)
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def model_facts(model: nn.Module) -> dict[str, Any]:
    """Return the class, name, dtypes and versions a result depends on."""
    inner = unwrap(model)
    config = getattr(inner, "config", None)
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in inner.parameters()})
    return {
        "class": type(inner).__name__,
        "name": getattr(config, "_name_or_path", "") or None,
        "dtype": " ".join(dtypes),
        "parameters": sum(parameter.numel() for parameter in inner.parameters()),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of curvfast, Python, torch, and of transformers if it is loaded."""
    found = {
        "curvfast": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    transformers = sys.modules.get("transformers")
    if transformers is not None:
        found["transformers"] = str(transformers.__version__)
    return found


def whole_model(model: Any) -> Any:
    """Return the model inside wrappers of data parallelism and ``torch.compile``.

    Raises:
        InputError: If the model is not of transformers, wrapped by PEFT, or sharded.
    """
    inner: Any = unwrap(model)
    if hasattr(inner, "get_base_model"):
        raise InputError(
            f"{type(inner).__name__} saves its adapters and not the weights that were edited: "
            "pass what its merge_and_unload() returns"
        )
    if not hasattr(inner, "save_pretrained"):
        raise InputError(
            f"{type(inner).__name__} is no model of transformers: keep its edit by "
            "curvfast.make_patch, or its state_dict() by safetensors"
        )
    if is_sharded_model(inner):
        raise InputError("the model is sharded: load it whole on one process, and edit that")
    return inner
