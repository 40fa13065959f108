"""An MLP-Mixer: an image classifier without attention, which mixes tokens by linear layers.

Source: Tolstikhin et al., "MLP-Mixer: An all-MLP Architecture for Vision", NeurIPS 2021.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu

from curvfast.display import ReportStage, silent
from curvfast.experiments.data.images import CLASSES, SIDE, NoisySplit
from curvfast.experiments.models.cache import Output, cached, load_weights, save_weights
from curvfast.experiments.models.vit import learn
from curvfast.experiments.recipes import VitRecipe

TOKENS_MLP = 64
"""Width inside the MLPs that mix tokens."""


class Mlp(nn.Module):
    """A two-layer MLP on the last dimension."""

    def __init__(self, width: int, inner: int) -> None:
        """Create the layers.

        Args:
            width: Width of input and output.
            inner: Width between the two layers.
        """
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., width] to [..., width]."""
        mapped: Tensor = self.fc2(gelu(self.fc1(x)))
        return mapped


class Block(nn.Module):
    """A Mixer block: an MLP over tokens, shared by channels, then one over channels."""

    def __init__(self, tokens: int, tokens_mlp: int, hidden: int, mlp: int) -> None:
        """Create both MLPs, each after a norm.

        Args:
            tokens: Patches of an image.
            tokens_mlp: Width inside the MLP on tokens.
            hidden: Channels.
            mlp: Width inside the MLP on channels.
        """
        super().__init__()
        self.token_norm, self.channel_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.token_mlp, self.channel_mlp = Mlp(tokens, tokens_mlp), Mlp(hidden, mlp)

    def forward(self, x: Tensor) -> Tensor:
        """Map [images, tokens, hidden] to the same shape."""
        x = x + self.token_mlp(self.token_norm(x).mT).mT
        mapped: Tensor = x + self.channel_mlp(self.channel_norm(x))
        return mapped


class Mixer(nn.Module):
    """An MLP-Mixer: patch embedding, blocks, a mean over tokens, and a linear classifier."""

    def __init__(
        self, *, image: int, patch: int, classes: int, hidden: int, tokens_mlp: int, mlp: int,
        layers: int,
    ) -> None:  # fmt: skip
        """Create the model, with torch's initialisation.

        Args:
            image: Height and width of an image of one channel, in pixels.
            patch: Height and width of a patch, a divisor of ``image``.
            classes: Number of classes.
            hidden: Channels of a token.
            tokens_mlp: Width inside the MLPs on tokens.
            mlp: Width inside the MLPs on channels.
            layers: Number of blocks.
        """
        super().__init__()
        self.patches = nn.Conv2d(1, hidden, patch, stride=patch)
        tokens = (image // patch) ** 2
        self.blocks = nn.ModuleList(
            Block(tokens, tokens_mlp, hidden, mlp) for _ in range(layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(hidden)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Output:
        """Classify images.

        Args:
            pixel_values: [images, 1, image, image].
            labels: Classes, int64 [images].

        Returns:
            Logits [images, classes], and with labels their mean cross-entropy.
        """
        x = self.patches(pixel_values).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        logits = self.classifier(self.norm(x).mean(1))
        return Output(logits, None if labels is None else cross_entropy(logits, labels))


def new_mixer(recipe: VitRecipe) -> Mixer:
    """Return a new Mixer of a recipe's sizes; the global random state is untouched.

    Args:
        recipe: Recipe of a vision transformer; its heads are not used.

    Returns:
        The model, in float32.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return Mixer(
            image=SIDE, patch=recipe.patch, classes=CLASSES, hidden=recipe.hidden,
            tokens_mlp=TOKENS_MLP, mlp=recipe.mlp, layers=recipe.layers,
        )  # fmt: skip


def trained_mixer(
    recipe: VitRecipe, split: NoisySplit, report_stage: ReportStage = silent
) -> Mixer:
    """Return the recipe's model, trained on the given labels now or on an earlier run."""
    return cached(
        "lab-mixer",
        recipe.training_key(),
        read=lambda folder: load_weights(new_mixer(recipe), folder).eval(),
        make=lambda unfinished: train_mixer(
            recipe, split, unfinished=unfinished, report_stage=report_stage
        ),
        write=lambda model, folder: save_weights(model, folder, asdict(recipe)),
    )


def train_mixer(
    recipe: VitRecipe,
    split: NoisySplit,
    *,
    unfinished: Path | None = None,
    report_stage: ReportStage = silent,
) -> Mixer:
    """Train from scratch on the given labels, as the lab's transformer is."""
    model: Mixer = learn(
        new_mixer(recipe), recipe, split, unfinished=unfinished, report_stage=report_stage
    )
    return model
