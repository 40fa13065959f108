"""Reader of Llama models in GGUF files, dequantized to float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvfast.errors import InputError

_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CONTROL_TOKEN = 3
# Pre-tokenizers that split digits one by one and otherwise work on bytes, by their GGUF name.
_DIGITS_AND_BYTES = ("smollm",)


def load_gguf(path: Path) -> tuple[Any, Any]:
    """Read a Llama checkpoint and its tokenizer from one GGUF file.

    Args:
        path: The file; any quantization the ``gguf`` package can dequantize.

    Returns:
        A ``LlamaForCausalLM`` in float32 and its tokenizer.

    Raises:
        InputError: If the architecture, the tokenizer or a tensor is not one this reader knows.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    facts = {key: field.contents() for key, field in reader.fields.items()}
    if facts.get("general.architecture") != "llama":
        raise InputError(
            f"{path.name} holds a {facts.get('general.architecture')!r} model; this reads 'llama'"
        )
    heads = {"attn_q": _heads(facts, "head_count"), "attn_k": _heads(facts, "head_count_kv")}
    weights = {}
    for tensor in reader.tensors:
        name = _name(tensor.name)
        values = torch.from_numpy(
            np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        )
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            values = _unpermute(values, heads[kind])
        weights[name] = values
    return _model(facts, weights), _tokenizer(facts, path)


def _heads(facts: dict[str, Any], key: str) -> int:
    return int(facts.get(f"llama.attention.{key}", facts["llama.attention.head_count"]))


def _name(name: str) -> str:
    """Return the transformers name of a GGUF tensor."""
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in _BLOCK and parts[3] == "weight":
        return f"model.layers.{parts[1]}.{_BLOCK[parts[2]]}.weight"
    if len(parts) == 2 and parts[0] in _TOP and parts[1] == "weight":
        return f"{_TOP[parts[0]]}.weight"
    raise InputError(f"GGUF tensor {name!r} has no place in a Llama model without biases")


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """Undo GGUF's order of rotary rows: it interleaves the halves that transformers keeps apart."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _model(facts: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    embedding = weights["model.embed_tokens.weight"]
    config = LlamaConfig(
        vocab_size=embedding.shape[0],
        hidden_size=embedding.shape[1],
        intermediate_size=facts["llama.feed_forward_length"],
        num_hidden_layers=facts["llama.block_count"],
        num_attention_heads=_heads(facts, "head_count"),
        num_key_value_heads=_heads(facts, "head_count_kv"),
        max_position_embeddings=facts["llama.context_length"],
        rms_norm_eps=facts["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": facts.get("llama.rope.freq_base", 10000.0),
        },
        tie_word_embeddings="lm_head.weight" not in weights,
        bos_token_id=facts.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=facts.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=facts.get("tokenizer.ggml.padding_token_id"),
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    lost = [name for name in missing if name != "lm_head.weight"]
    if lost or unexpected:
        raise InputError(f"the GGUF file lacks {lost} and has {unexpected} too many")
    # Rotary frequencies are not in a checkpoint: they are built on the weights' device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def _tokenizer(facts: dict[str, Any], path: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind, split = facts.get("tokenizer.ggml.model"), facts.get("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in _DIGITS_AND_BYTES:
        raise InputError(
            f"{path.name} has a {kind!r} tokenizer splitting by {split!r}; this reads 'gpt2' "
            f"splitting by one of {', '.join(map(repr, _DIGITS_AND_BYTES))}"
        )
    words = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    types = facts["tokenizer.ggml.token_type"]
    core.add_special_tokens([w for w, t in zip(words, types, strict=True) if t == _CONTROL_TOKEN])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=words[facts["tokenizer.ggml.bos_token_id"]],
        eos_token=words[facts["tokenizer.ggml.eos_token_id"]],
        pad_token=words[facts["tokenizer.ggml.padding_token_id"]],
    )
