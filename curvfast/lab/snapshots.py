"""Snapshots of the demo's language model during its training, cached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvfast.demo.caching import cached, key_of
from curvfast.demo.corpus import Corpus
from curvfast.demo.recipe import Recipe
from curvfast.demo.training import train, untrained
from curvfast.errors import InputError
from curvfast.progress import Say, silent
from curvfast.storage import read_folder, write_folder

Weights = dict[str, Tensor]
"""Parameters by name, on the CPU."""
KIND = "curvfast-snapshots"


def snapshots(
    recipe: Recipe, corpus: Corpus, steps: Sequence[int], say: Say = silent
) -> dict[int, Weights]:
    """Return the weights after each of ``steps`` optimizer steps, trained now or kept earlier.

    It is the training of :func:`curvfast.demo.training.train`: the final weights are, bit for bit,
    those of the demo's model.

    Args:
        recipe: Sizes, schedule and seed.
        corpus: What it learns.
        steps: Each from 0, the untrained model, to ``recipe.steps``.
        say: Told how far it is.

    Returns:
        Weights by step, in rising order.

    Raises:
        InputError: If a step is not in that range, or there is none.
        StorageError: If what was kept is damaged.
    """
    wanted = sorted({*steps})
    if not wanted or wanted[0] < 0 or wanted[-1] > recipe.steps:
        raise InputError(f"steps={list(steps)}: pass some, each from 0 to {recipe.steps}")
    return cached(
        "demo-lm-steps",
        key_of({"training": recipe.training_key(), "steps": wanted}),
        read=_read,
        make=lambda unfinished: _train(recipe, corpus, wanted, unfinished, say),
        write=_write,
    )


def restored(recipe: Recipe, weights: Mapping[str, Tensor]) -> Any:
    """Return a model of the recipe with these weights, in eval mode."""
    model = untrained(recipe).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model


def _train(
    recipe: Recipe, corpus: Corpus, steps: Sequence[int], unfinished: Path, say: Say
) -> dict[int, Weights]:
    def keep(model: Any, taken: int) -> None:
        # On disk, where a training that goes on finds the snapshots from before it was cut off.
        if taken in steps:
            _write({taken: dict(model.named_parameters())}, unfinished / f"step-{taken}")

    train(recipe, corpus, keep, unfinished=unfinished, say=say)
    return {step: _read(unfinished / f"step-{step}")[step] for step in steps}


def _write(found: Mapping[int, Weights], folder: Path) -> None:
    tensors = {
        f"{step}.{name}": tensor
        for step, weights in found.items()
        for name, tensor in weights.items()
    }
    write_folder(folder, kind=KIND, meta={"steps": list(found)}, tensors=tensors)


def _read(folder: Path) -> dict[int, Weights]:
    meta, tensors = read_folder(folder, kind=KIND)
    found: dict[int, Weights] = {step: {} for step in meta["steps"]}
    for key, tensor in tensors.items():
        step, name = key.split(".", 1)
        found[int(step)][name] = tensor
    return found
