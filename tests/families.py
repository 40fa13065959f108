"""Tiny models of the families transformers knows, by the way they store and call their weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from cases import VOCABULARY
from torch import nn

_SMALL = {
    "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "vocab_size": VOCABULARY,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    "attn_implementation": "sdpa",
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
_MIXTURES: dict[str, dict[str, Any]] = {
    "Mixtral": {},
    # A shared expert, and a first layer without a mixture.
    "Qwen2Moe": {
        "moe_intermediate_size": 12, "shared_expert_intermediate_size": 14, "mlp_only_layers": [0],
        "decoder_sparse_step": 1,
    },
    "Qwen3Moe": {"moe_intermediate_size": 12, "decoder_sparse_step": 1, "mlp_only_layers": []},
    # Weights stored [d_in, d_out], biases, gate and up interleaved.
    "GptOss": {"layer_types": ["full_attention", "full_attention"]},
    "Olmoe": {},
}  # fmt: skip
DENSE = ("Llama", "Phi3", "Olmo2", "Qwen3")
MIXTURES = tuple(_MIXTURES)
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def dense(family: str, **changes: Any) -> nn.Module:
    """Grouped-query attention throughout: 4 heads, 2 of keys and values."""
    return _causal(family, {**_SMALL, **changes})


def mixture(family: str, implementation: str = "grouped_mm", **changes: Any) -> nn.Module:
    settings = {**_SMALL, **_EXPERTS, **_MIXTURES[family], **changes}
    model = _causal(family, {**settings, "experts_implementation": implementation})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Routers that choose, experts that differ, biases that would show if they were counted.
            if any(part in name for part in ("experts", "gate", "router")):
                parameter.normal_(std=0.3)
    return model


def _causal(family: str, settings: dict[str, Any]) -> nn.Module:
    if family == "GptOss":
        settings = {**settings, "attn_implementation": "eager"}
    config = getattr(transformers, f"{family}Config")(**settings)
    return getattr(transformers, f"{family}ForCausalLM")(config)
