"""Checks of hyper-parameters, made when a baseline is created."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from curvfast.baselines.examples import SCORED
from curvfast.errors import InputError


def check_ratio(ratio: float) -> None:
    """Check that ``ratio`` is a share.

    Raises:
        InputError: If it is not between 0 and 1.
    """
    if not 0 < ratio < 1:
        raise InputError(f"ratio={ratio}: pass the share of weights to drop, between 0 and 1")


def check_clean_weight(clean_weight: float) -> None:
    """Check that the weight of memorized text is positive.

    Raises:
        InputError: If it is not.
    """
    if not 0 <= clean_weight < 1:
        raise InputError(
            f"clean_weight={clean_weight}: pass w in [0, 1); at 1 nothing would be forgotten"
        )


def check_reading(batch_size: int, scored: str) -> None:
    """Check the batch size and the choice of scored tokens.

    Raises:
        InputError: If one is out of range.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}: pass a positive number of rows of each set")
    if scored not in SCORED:
        raise InputError(f"scored={scored!r}: pass 'all' or 'suffix'")


def check_training(epochs: int, learning_rate: float, **others: float) -> None:
    """Check the hyper-parameters of an optimiser.

    Args:
        epochs: Positive.
        learning_rate: Positive and finite.
        others: Further hyper-parameters by name, finite and not negative.

    Raises:
        InputError: If one is out of range.
    """
    if epochs < 1:
        raise InputError(f"epochs={epochs}: pass a positive number")
    if not 0 < learning_rate < float("inf"):
        raise InputError(f"learning_rate={learning_rate}: pass a positive number")
    for name, value in others.items():
        if not 0 <= value < float("inf"):
            raise InputError(f"{name}={value}: pass 0 or a positive number")


def dropped(ratio: float, weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Return round(ratio · weights) of each layer.

    Raises:
        InputError: If it is 0 for a layer.
    """
    counts = {name: round(ratio * weight.numel()) for name, weight in weights.items()}
    for name, count in counts.items():
        if not count:
            raise InputError(
                f"ratio={ratio} of the {weights[name].numel()} weights of layer {name!r} is none; "
                "raise it, or leave the layer out of layers="
            )
    return counts
