"""A Llama written to a GGUF file and read back is the same Llama, with the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from curvfast.errors import InputError
from curvfast.hf.gguf import load_gguf

HEADS, KV_HEADS = 4, 2
WORDS = ["<|end|>", "<|start|>", "a", "b", "1", "2", "Ġ", "ab", "Ġab", "12"]
MERGES = ["a b", "Ġ ab", "1 2"]


def tiny(tied: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            vocab_size=len(WORDS),
            max_position_embeddings=48,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            tie_word_embeddings=tied,
        )
    ).eval()


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The row order of the format: the two halves of each head's rotary rows, alternating."""
    out = torch.empty_like(weight)
    size = weight.shape[0] // heads
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = weight[head * size + i]
            out[head * size + 2 * i + 1] = weight[head * size + size // 2 + i]
    return out


NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write(
    path: Path,
    model: Any,
    *,
    architecture: str = "llama",
    split: str = "smollm",
    quantized: bool = False,
    extra: bool = False,
) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(48)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(500.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, *[1] * (len(WORDS) - 2)])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    for name, value in tensors(model).items():
        data = value.numpy()
        if quantized and value.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    if extra:
        writer.add_tensor("blk.0.attn_q.bias", torch.zeros(64).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(model: Any) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    found = {"token_embd.weight": state["model.embed_tokens.weight"]}
    found["output_norm.weight"] = state["model.norm.weight"]
    if not model.config.tie_word_embeddings:
        found["output.weight"] = state["lm_head.weight"]
    for i in range(2):
        for ours, theirs in NAMES.items():
            value = state[f"model.layers.{i}.{ours}.weight"]
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(theirs)
            found[f"blk.{i}.{theirs}.weight"] = interleaved(value, heads) if heads else value
    return found


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_the_model_read_back_is_the_model_written(tmp_path: Path, tied: bool) -> None:
    model = tiny(tied)
    write(tmp_path / "m.gguf", model)
    found, _ = load_gguf(tmp_path / "m.gguf")
    tokens = torch.randint(len(WORDS), (3, 20))
    assert torch.equal(found(input_ids=tokens).logits, model(input_ids=tokens).logits)
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == tied
    assert not any(p.is_meta for p in [*found.parameters(), *found.buffers()])


@torch.no_grad()
def test_quantized_weights_come_back_as_near_as_their_blocks(tmp_path: Path) -> None:
    model = tiny(True)
    write(tmp_path / "m.gguf", model, quantized=True)
    found, _ = load_gguf(tmp_path / "m.gguf")
    for name, value in model.state_dict().items():
        # Q8_0 rounds to a 254th of a block's largest value, and the block's scale to float16.
        bound = value.abs().max() * (1 / 254 + 1 / 2048)
        assert (found.state_dict()[name] - value).abs().max() <= bound, name


def test_tokens_split_by_digits_and_bytes(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", tiny(True))
    _, tokenizer = load_gguf(tmp_path / "m.gguf")
    assert tokenizer.tokenize("ab ab12<|end|>") == ["ab", "Ġab", "1", "2", "<|end|>"]
    assert tokenizer.decode(tokenizer("ab 12")["input_ids"]) == "ab 12"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|start|>", "<|end|>")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "mamba"}, "this reads 'llama'"),
        ({"split": "qwen2"}, "splitting by 'qwen2'"),
        ({"extra": True}, r"attn_q\.bias"),
    ],
)
def test_what_it_cannot_read_it_names(tmp_path: Path, changes: Any, message: str) -> None:
    write(tmp_path / "m.gguf", tiny(True), **changes)
    with pytest.raises(InputError, match=message):
        load_gguf(tmp_path / "m.gguf")
