"""Small randomly initialised transformers models and tokenizers, without downloads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from curvfast.errors import InputError


def train_tokenizer(texts: Iterable[str], vocabulary: int, *, digits: bool = False) -> Any:
    """Train a byte-level BPE tokenizer whose only special token is ``<eot>``, id 0.

    Args:
        texts: Documents.
        vocabulary: Number of tokens.
        digits: Whether each digit is a separate token.

    Returns:
        A ``PreTrainedTokenizerFast``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pieces])
        if digits
        else pieces
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<eot>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eot>", pad_token="<eot>", bos_token="<eot>"
    )


def new_llama(
    *,
    vocabulary: int,
    hidden: int,
    mlp: int,
    layers: int,
    heads: int,
    length: int,
    seed: int,
    spread: str = "library",
) -> Any:
    """Return a freshly initialised Llama with tied embeddings.

    The global random state is untouched.

    Args:
        vocabulary: Number of tokens.
        hidden: Width.
        mlp: Width inside the MLPs.
        layers: Number of blocks.
        heads: Attention heads.
        length: Longest sequence.
        seed: Seed of the weights.
        spread: Scale of the initial weights: ``"library"``, transformers' 0.02; or ``"width"``,
            torch's, one over the root of a layer's width, with which a narrow model learns
            attention patterns far sooner.

    Returns:
        A ``LlamaForCausalLM`` in float32.

    Raises:
        InputError: If ``spread`` is something else.
    """
    if spread not in ("library", "width"):
        raise InputError(f"spread={spread!r}: pass 'library' or 'width'")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=length,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        # The output layer is tied to the embedding, and keeps its scale.
        for module in model.model.modules() if spread == "width" else ():
            if isinstance(module, torch.nn.Linear):
                module.reset_parameters()
        return model


def save(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write a checkpoint that ``from_pretrained`` loads."""
    with without_bars():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def load(directory: Path) -> tuple[Any, Any]:
    """Read a causal language model in float32 and its tokenizer from a local folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with without_bars():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(directory)


@contextmanager
def without_bars() -> Iterator[None]:
    """Silence transformers' bars, which are drawn on files and pipes too."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
