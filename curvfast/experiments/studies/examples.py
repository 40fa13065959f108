"""Groups of memorized, seen and unseen examples of a model, as batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.experiments.data.corpus import load_corpus
from curvfast.experiments.studies.study import StudyConfig
from curvfast.experiments.studies.subjects import demo_lm, lab_vit
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.model.forward import logits_of
from curvfast.model.rows import IGNORED_LABEL

_PICTURES, _TEXTS, _AT_ONCE = 300, 64, 32

Batches = list[dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Groups:
    """Examples of one model by group: ``memorized``, ``seen`` in training, ``unseen``."""

    model: Any
    basis: Eigenbasis
    mass: float
    """ρ of the model's reported edit."""
    unit: float
    """Root mean square of the input's entries."""
    batches: Mapping[str, Batches]
    fitted: Mapping[str, float]
    """Share of each group for which every label is the model's top prediction; for
    ``memorized`` before the others were left out."""


def pictures(config: StudyConfig) -> Groups:
    """Return digits with memorized wrong labels, rightly labelled ones, and unseen ones."""
    subject = lab_vit(config)
    split = subject.split
    noisy = split.noisy.nonzero().squeeze(1)[:_PICTURES]
    clean = split.noisy.logical_not().nonzero().squeeze(1)[:_PICTURES]
    chosen = {
        "memorized": (split.train.pixels[noisy], split.given[noisy]),
        "seen": (split.train.pixels[clean], split.given[clean]),
        "unseen": (split.validation.pixels[:_PICTURES], split.validation.labels[:_PICTURES]),
    }
    examples = {
        name: {"pixel_values": pixels, "labels": labels}
        for name, (pixels, labels) in chosen.items()
    }
    unit = _size(split.train.pixels)
    return _groups(subject.model, subject.basis, subject.recipe.mass, unit, examples, shift=0)


def texts(config: StudyConfig) -> Groups:
    """Return recited passages, prose of the training text, and other passages of their sources.

    The loss is that of the suffix given the prefix. The unseen ones are of the same speeches and
    books as the passages, but were not trained on.
    """
    subject = demo_lm(config)
    recipe, corpus = subject.recipe, subject.corpus
    span = recipe.prefix + recipe.suffix
    generator = torch.Generator().manual_seed(recipe.seed + 2)
    starts = torch.randint(len(corpus.train) - span, (_TEXTS,), generator=generator)
    planted = set(map(tuple, corpus.canaries.tolist()))
    other = load_corpus(replace(recipe, seed=recipe.seed + 1, passages=2 * recipe.passages))
    order = torch.randperm(len(other.canaries), generator=generator)
    fresh = [row for row in other.canaries[order] if tuple(row.tolist()) not in planted]
    rows = {
        "memorized": corpus.canaries,
        "seen": torch.stack([corpus.train[s : s + span] for s in starts.tolist()]),
        "unseen": torch.stack(fresh[:_TEXTS]),
    }
    examples = {}
    for name, ids in rows.items():
        tokens = nn.functional.pad(ids, (1, 0))
        labels = tokens.clone()
        labels[:, : 1 + recipe.prefix] = IGNORED_LABEL
        examples[name] = {"input_ids": tokens, "labels": labels}
    unit = _size(subject.model.get_input_embeddings().weight.detach())
    return _groups(subject.model, subject.basis, recipe.mass, unit, examples, shift=1)


def _groups(
    model: Any,
    basis: Eigenbasis,
    mass: float,
    unit: float,
    examples: Mapping[str, dict[str, Tensor]],
    *,
    shift: int,
) -> Groups:
    """Restrict the memorized group to recited examples, if any, and split all into batches."""
    batches, shares = {}, {}
    for name, group in examples.items():
        known = _fitted(model, group, shift)
        shares[name] = float(known.double().mean())
        if name == "memorized" and known.any():
            group = {key: value[known] for key, value in group.items()}
        parts = (value.split(_AT_ONCE) for value in group.values())
        batches[name] = [dict(zip(group, own, strict=True)) for own in zip(*parts, strict=True)]
    return Groups(model, basis, mass, unit, batches, shares)


@torch.no_grad()
def _fitted(model: nn.Module, group: Mapping[str, Tensor], shift: int) -> Tensor:
    """Return whether every label is the model's top prediction, bool [examples]."""
    labels = group["labels"]
    inputs = {key: value for key, value in group.items() if key != "labels"}
    found = logits_of(model(**inputs)).argmax(-1)
    if shift:
        found, labels = found[:, :-shift], labels[:, shift:]
    right = (found == labels) | (labels == IGNORED_LABEL)
    return right.flatten(1).all(1) if right.dim() > 1 else right


def _size(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())
