"""Facts about a model and its environment, and whether it can be saved as it is."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from curvfast._version import __version__
from curvfast.distributed import is_sharded_model
from curvfast.errors import InputError

# Language models that also read images or sound; those with an encoder-decoder are not causal.
_ABOUT_IMAGES = ("ForConditionalGeneration", "ForImageTextToText", "ForVision2Seq")
_HEAD = re.compile("For[A-Z]")


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
    """Return whether position t of a model is taken to predict the token at t + 1.

    See :func:`causal_convention`, which also tells who says so.
    """
    return causal_convention(model)[0]


def causal_convention(model: nn.Module) -> tuple[bool, str]:
    """Return whether position t is taken to predict the token at t + 1, and who says so.

    By conventions of transformers: a class ``...ForCausalLM`` or ``...LMHeadModel``; a
    ``...ForConditionalGeneration`` or ``...ForImageTextToText`` around a language model that is no
    encoder-decoder; or a wrapper without a head of its own around one of these. Recognised by
    names, so that transformers is not imported for models of other libraries.

    Args:
        model: Any module, wrapped or not.
    """
    inner = unwrap(model)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        return False, f"config.is_encoder_decoder of {type(inner).__name__}"
    # peft keeps the model it wraps behind this method.
    base = getattr(inner, "get_base_model", None)
    inner = base() if callable(base) else inner
    for module in _outermost_first(inner):
        says = _says_causal(module)
        if says is not None:
            return says, f"class {type(module).__name__}"
    return False, f"class {type(inner).__name__}, which does not say"


def says_causal(output: Any) -> bool:
    """Return whether an output is of a class that transformers gives causal language models."""
    return any("CausalLMOutput" in cls.__name__ for cls in type(output).__mro__)


def _outermost_first(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of a model by depth."""
    level = [model]
    while level:
        yield from level
        level = [child for module in level for child in module.children()]


def _says_causal(module: nn.Module) -> bool | None:
    """Return what the class of a module says, or None if it is no model with a head."""
    config = getattr(module, "config", None)
    names = [cls.__name__ for cls in type(module).__mro__]
    encodes = [getattr(c, "is_encoder_decoder", False) for c in (config, _text_config(config))]
    if any(encodes):
        return False
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return True
    if any(name.endswith(_ABOUT_IMAGES) for name in names) and _text_config(config) is not None:
        return True
    if config is None or not any(_HEAD.search(name) for name in names):
        return None
    return bool(getattr(config, "is_decoder", False)) and any("LMHead" in name for name in names)


def _text_config(config: Any) -> Any:
    return getattr(config, "text_config", None)


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
