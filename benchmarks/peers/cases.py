"""Cases of the comparison with peers: a model, its batches, its layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A small Llama and random tokens; the layers are its MLP linears."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    vocabulary: int
    attention: str
    sequences: int = 8
    length: int = 128
    batches: int = 8
    sampled: bool = False
    """Labels are drawn from the model's prediction, the default of the method and of libraries."""

    def model(self) -> nn.Module:
        """Return the model, float32, in eval mode, the same one every time."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            num_hidden_layers=self.layers, hidden_size=self.hidden, intermediate_size=self.mlp,
            num_attention_heads=self.heads, num_key_value_heads=self.heads,
            vocab_size=self.vocabulary, max_position_embeddings=self.length,
            attn_implementation=self.attention,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return LlamaForCausalLM(config).eval()

    def data(self, count: int | None = None) -> list[dict[str, Tensor]]:
        """Return the first ``count`` batches, or all."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.sequences, self.length)
        return [
            {"input_ids": torch.randint(self.vocabulary, shape, generator=generator)}
            for _ in range(self.batches if count is None else count)
        ]

    def names(self, model: nn.Module) -> list[str]:
        """Return the names of the MLP linears."""
        linears = (n for n, m in model.named_modules() if isinstance(m, nn.Linear))
        return [name for name in linears if ".mlp." in name]


CASES = {
    "peers": Case(4, 256, 1024, 4, 2048, "eager"),
    "wide": Case(6, 512, 1408, 8, 2048, "sdpa"),
    "words": Case(6, 512, 1408, 8, 32000, "sdpa", batches=4),
    "sampled": Case(6, 512, 1408, 8, 32000, "sdpa", batches=4, sampled=True),
    "smoke": Case(2, 32, 48, 2, 64, "eager", sequences=2, length=16, batches=2),
    "smoke-sampled": Case(
        2, 32, 48, 2, 64, "eager", sequences=8, length=128, batches=4, sampled=True
    ),
}
