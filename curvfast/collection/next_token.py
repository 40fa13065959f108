"""Next token: whether position t of a model predicts the token at t + 1, and who says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from curvfast import distributed
from curvfast.kfac.known import CONVENTION, PROVEN, TOLD, Known
from curvfast.model.foresight import probe
from curvfast.model.identity import causal_convention, unwrap
from curvfast.model.rows import IGNORED_LABEL

NEXT, OWN = "position t predicts the token at t + 1", "position t predicts the label at t"


def told(skip_last: bool) -> Known:
    """Return the rule that the caller gave."""
    return Known(NEXT if skip_last else OWN, f"skip_last={skip_last}", TOLD)


def labels_are_tokens(batch: Any) -> bool:
    """Return whether a batch's labels are its own tokens, to be shifted by who scores them.

    Labels that are shifted already, or are of other kinds, are of their own positions.

    Args:
        batch: As the caller gave it.
    """
    labels, ids = (batch.get(key) for key in ("labels", "input_ids"))
    if not (isinstance(labels, Tensor) and isinstance(ids, Tensor)) or labels.shape != ids.shape:
        return True
    labelled = labels != IGNORED_LABEL
    return bool((labels.to(ids.device) == ids)[labelled.to(ids.device)].all())


def of_given_labels(model: nn.Module, batch: Any, found: tuple[bool, Known]) -> tuple[bool, Known]:
    """Return whether given labels are shifted, where that is known of predictions alone.

    Args:
        model: A class of transformers that shifts labels itself does so, whatever they are.
        batch: The first one.
        found: What :func:`causality` found.
    """
    causal, _ = found
    if not causal or causal_convention(model)[0] or not isinstance(batch, Mapping):
        return found
    if "labels" not in batch or labels_are_tokens(batch):
        return found
    return False, Known(OWN, "the batch's labels, which are not its tokens", CONVENTION)


def causality(model: nn.Module, arguments: Mapping[str, Any]) -> tuple[bool, Known]:
    """Return whether position t predicts the token at t + 1, and how that is known.

    A model is asked by one probe (:func:`curvfast.model.foresight.probe`): predictions that no
    later position reaches, as wide as the vocabulary, are of the next token; predictions that later
    positions reach are not, unless the class says that its loss shifts. Names decide alone where
    the probe cannot.

    Args:
        model: In a frozen block, without hooks that count.
        arguments: What it is called with.
    """
    convention, by = causal_convention(model)
    named = Known(NEXT if convention else OWN, by, CONVENTION)
    decodes = getattr(getattr(unwrap(model), "config", None), "is_encoder_decoder", False)
    if decodes or distributed.is_sharded_model(model):
        return convention, named
    found = probe(model, arguments)
    if found.later is False and found.vocabulary:
        seen = "no prediction depends on later positions, and outputs are as wide as the vocabulary"
        return True, Known(NEXT, seen, PROVEN)
    if found.later and not convention:
        return False, Known(OWN, "predictions depend on later positions", PROVEN)
    if found.later is None and found.causal_output and not convention:
        return True, Known(NEXT, "the class of its output", CONVENTION)
    return convention, named
