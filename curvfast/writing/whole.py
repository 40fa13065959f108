"""Check that a model of transformers can be saved as it is: unwrapped and not sharded."""

from __future__ import annotations

from typing import Any

from curvfast.distributed import is_sharded_model
from curvfast.errors import InputError
from curvfast.provenance import unwrap


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
