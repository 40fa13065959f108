"""Small models of real architectures, with data, as thunks; each shape says why it is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

VOCABULARY = 61  # prime: no tile or power of two hides an index error


@dataclass(frozen=True)
class Case:
    """A model, its batches, the layers measured, and what counts."""

    name: str
    model: Callable[[], nn.Module]
    batches: Callable[[], list[dict[str, Any]]]
    layers: str
    keep: Callable[[dict[str, Any]], Tensor]
    loss: Callable[[Any, dict[str, Any]], Tensor]
    """The summed loss."""

    def __str__(self) -> str:
        return self.name


def llama(**changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**_LLAMA, **changes}))


_LLAMA = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
    "attn_implementation": "sdpa", "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=24,
            n_layer=2,
            n_head=2,
            vocab_size=VOCABULARY,
            n_positions=64,
            attn_implementation="sdpa",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
            num_channels=1,
            num_labels=5,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def basis_of(model: nn.Module, layers: str = "mlp") -> Any:
    """Return the eigenbasis of a language model's layers on more rows than they are wide."""
    import curvfast

    batches = token_batches(sizes=(40, 41))
    return curvfast.collect_from(model, batches, layers=layers, progress=False).eigh()


def token_batches(
    padding: str = "both", sizes: Sequence[int] = (11, 12, 13)
) -> list[dict[str, Any]]:
    """Return batches of unequal length: none, right, left, or both kinds of padding."""
    batches = []
    for length in sizes:
        tokens = torch.randint(1, VOCABULARY, (4, length))
        mask = torch.ones_like(tokens)
        if padding in ("right", "both"):
            mask[0, 7:] = 0
        if padding in ("left", "both"):
            mask[1, :3] = 0
        batch = {"input_ids": tokens, "labels": tokens.masked_fill(mask == 0, -100)}
        batches.append(batch if padding == "none" else {**batch, "attention_mask": mask})
    return batches


def image_batches() -> list[dict[str, Any]]:
    return [
        {"pixel_values": torch.randn(n, 1, 16, 16), "labels": torch.randint(5, (n,))}
        for n in (6, 3)
    ]


def keep_tokens(batch: dict[str, Any]) -> Tensor:
    """Real positions but the last of each sequence, row by row."""
    keep = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool().clone()
    for row in keep:
        row[row.nonzero()[-1]] = False
    return keep


def keep_patches(batch: dict[str, Any]) -> Tensor:
    return torch.ones(len(batch["labels"]), 5, dtype=torch.bool)


def token_loss(output: Any, batch: dict[str, Any]) -> Tensor:
    logits = output.logits[:, :-1].flatten(0, 1)
    return cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction="sum")


def image_loss(output: Any, batch: dict[str, Any]) -> Tensor:
    return cross_entropy(output.logits, batch["labels"], reduction="sum")


CASES = [
    Case("llama-mlp", llama, token_batches, "mlp", keep_tokens, token_loss),
    Case("llama-all", llama, lambda: token_batches("none"), "all", keep_tokens, token_loss),
    Case("gpt2-conv1d", gpt2, token_batches, "mlp", keep_tokens, token_loss),
    Case("gpt2-attention", gpt2, token_batches, "attention", keep_tokens, token_loss),
    Case("vit", vit, image_batches, "mlp", keep_patches, image_loss),
]
