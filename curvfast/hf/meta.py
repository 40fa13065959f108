"""Models on the meta device, from a configuration or one of the well-known shapes."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.errors import InputError, first_line

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {"model_type": "gpt2"},
    "llama-3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    "olmo-2-1b": {
        "model_type": "olmo2",
        "vocab_size": 100352,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 4096,
    },
    "olmo-2-7b": {
        "model_type": "olmo2",
        "vocab_size": 100352,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "vit-base": {"model_type": "vit", "num_labels": 1000},
}
"""Fields of config.json by model name; missing ones take the class's defaults."""


def meta_model(source: Any, dtype: torch.dtype) -> nn.Module:
    """Return the model of a configuration on the meta device, in eval mode.

    Args:
        source: A name in :data:`curvfast.hf.meta.SHAPES`, a folder with a config.json, the path
            of such a file, or a configuration of transformers.
        dtype: Dtype of the weights.

    Returns:
        A causal language model or an image classifier, whichever the configuration describes.

    Raises:
        InputError: If there is no such configuration, or no such model of it.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageClassification

    config = _read(source) if isinstance(source, str | PathLike) else source
    kinds = [AutoModelForCausalLM, AutoModelForImageClassification]
    if any("ForImageClassification" in name for name in getattr(config, "architectures", ()) or ()):
        kinds.reverse()
    kind = next((kind for kind in kinds if type(config) in kind._model_mapping), None)
    if kind is None:
        raise InputError(
            f"{type(config).__name__} describes neither a causal language model nor an image "
            "classifier; pass the model itself, made under torch.device('meta')"
        )
    with torch.device("meta"):
        model: nn.Module = kind.from_config(config, dtype=dtype)
    return model.eval()


def example_batch(model: nn.Module, batch: int, seq_len: int) -> dict[str, Tensor]:
    """Return a batch of the model's inputs on the meta device.

    Args:
        model: A model of transformers.
        batch: Sequences or images.
        seq_len: Tokens of a sequence; ignored for images.

    Returns:
        ``input_ids`` [batch, seq_len] or ``pixel_values`` [batch, channels, height, width].

    Raises:
        InputError: If it is not a model of transformers that reads tokens or images.
    """
    name = getattr(model, "main_input_name", None)
    if name == "input_ids":
        return {name: torch.empty(batch, seq_len, dtype=torch.long, device="meta")}
    if name == "pixel_values":
        config: Any = model.config
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch, config.num_channels, height, width)
        return {name: torch.empty(shape, dtype=next(model.parameters()).dtype, device="meta")}
    raise InputError(
        f"what a {type(model).__name__} reads is unknown; pass example=, a batch such as "
        "collect_from is given"
    )


def _read(source: str | PathLike[str]) -> Any:
    from transformers import AutoConfig

    path = Path(source)
    if isinstance(source, str) and source in SHAPES:
        shape = dict(SHAPES[source])
        return AutoConfig.for_model(shape.pop("model_type"), **shape)
    if not (path.is_file() or (path / "config.json").is_file()):
        raise InputError(
            f"there is no model {str(source)!r}: pass a folder with a config.json, the path of "
            f"such a file, or a built-in name: {', '.join(sorted(SHAPES))}. Nothing is downloaded"
        )
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path} is no configuration transformers can read: {first_line(error)}"
        ) from error
