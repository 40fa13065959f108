"""NoisySplit: an image data set with random wrong labels, which can only be memorized."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvfast.errors import InputError
from curvfast.lab.images import CLASSES, Images


@dataclass(frozen=True)
class NoisySplit:
    """Training images, some with a wrong label, and held-out images."""

    train: Images
    """With true labels."""
    given: Tensor
    """The labels trained on, int64 [train]."""
    noisy: Tensor
    """True where the given label is wrong, bool [train]."""
    fresh: Images
    """Images for statistics."""
    validation: Images


def noisy_split(
    first: Images,
    second: Images,
    *,
    train: int,
    fresh: int,
    validation: int,
    noise: float,
    seed: int,
) -> NoisySplit:
    """Split images and give a share of the training ones a wrong label.

    Args:
        first: Images for training and statistics.
        second: Images for validation; if empty, they are taken from ``first``.
        train: Number of training pictures.
        fresh: Number of pictures for statistics.
        validation: Number of pictures for validation.
        noise: Share of the training pictures with a label drawn from the nine wrong ones.
        seed: Seed of everything random.

    Returns:
        Sets that share no picture.

    Raises:
        InputError: If there are too few pictures, or ``noise`` is not in [0, 1].
    """
    if not 0 <= noise <= 1:
        raise InputError(f"noise={noise}: pass a share of the training pictures, in [0, 1]")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(first), generator=generator)
    measured = torch.randperm(len(second), generator=generator)
    if len(second) == 0:
        # From the other end, so that the number of fresh images does not change the validation set.
        second, measured = first, order[train + fresh :].flip(0)
    if train + fresh > len(first) or validation > len(measured):
        raise InputError(
            f"{len(first)} and {len(measured)} pictures are too few for {train} to train on, "
            f"{fresh} for statistics and {validation} for validation; ask for fewer"
        )
    chosen = first.take(order[:train])
    noisy = torch.zeros(train, dtype=torch.bool)
    noisy[torch.randperm(train, generator=generator)[: round(noise * train)]] = True
    shift = torch.randint(1, CLASSES, (train,), generator=generator)
    return NoisySplit(
        train=chosen,
        given=torch.where(noisy, (chosen.labels + shift) % CLASSES, chosen.labels),
        noisy=noisy,
        fresh=first.take(order[train : train + fresh]),
        validation=second.take(measured[:validation]),
    )
