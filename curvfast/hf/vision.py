"""Small randomly initialised vision transformers, without downloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from curvfast.hf.small import without_bars


def new_vit(
    *,
    image: int,
    patch: int,
    channels: int,
    classes: int,
    hidden: int,
    mlp: int,
    layers: int,
    heads: int,
    seed: int,
) -> Any:
    """Return a freshly initialised vision transformer without dropout.

    The global random state is untouched.

    Args:
        image: Height and width of an image, in pixels.
        patch: Height and width of a patch, in pixels.
        channels: Channels of an image.
        classes: Number of classes.
        hidden: Width.
        mlp: Width inside the MLPs.
        layers: Number of blocks.
        heads: Attention heads.
        seed: Seed of the weights.

    Returns:
        A ``ViTForImageClassification`` in float32; it classifies by its first token, CLS.
    """
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=image, patch_size=patch, num_channels=channels, num_labels=classes,
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ViTForImageClassification(config)
        # With the library's initial scale of 0.02 a narrow model memorizes little.
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.reset_parameters()
    return model


def save_vit(model: Any, directory: Path) -> None:
    """Write a checkpoint that ``from_pretrained`` loads."""
    with without_bars():
        model.save_pretrained(directory)


def load_vit(directory: Path) -> Any:
    """Read an image classifier in float32 from a local folder."""
    from transformers import ViTForImageClassification

    with without_bars():
        return ViTForImageClassification.from_pretrained(directory, dtype=torch.float32)
