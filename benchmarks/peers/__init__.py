"""Other libraries' K-FAC factors of one model, data and layers, run for real: ``make bench-peers``.

A peer is a module here that says which package it is, in which convention its factors come and
how it comes to count the rows it does, and whose ``prepare(model, batches, layers)`` returns a
:class:`Fit`. What is timed is ``run`` alone: the peer's own fit, as its users call it. ``sums``
undoes its convention.

All count the same rows: every position that has a label, the next token. Where a case samples
labels, ``prepare_sampled`` of those in :data:`SAMPLING` does as ``prepare``, with labels drawn from
the model's own prediction. Who can drop the last position of a sequence is given whole sequences;
the others are given them without their last token, which a causal model's earlier positions do not
see. Work that an option of a peer's own, or freezing parameters it does not need, can spare it is
spared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Batch = Mapping[str, Tensor]
Moments = Mapping[str, tuple[Tensor, Tensor]]

PEERS = (
    "ours", "official", "kronfluence", "bergson", "curvlinops", "asdfghjkl", "nngeometry", "dattri",
)  # fmt: skip

SAMPLING = ("ours", "official", "kronfluence")
"""Peers with labels drawn from the model's prediction."""

ABSENT = {
    "kfac-pytorch": "pip: No matching distribution found for kfac-pytorch",
    "logix-ai 0.1.1": "pip: require a different python version: Requires-Python <3.11.0,>=3.6.0",
    "laplace-torch 0.3": "no factors of its own: its Kron is a backend's, curvlinops's by default",
}
"""Peers that are not run, and why."""


@dataclass(frozen=True)
class Fit:
    """A prepared peer: its fit, and the conversion of its result."""

    run: Callable[[], Any]
    """Measures all factors from scratch at each call."""
    sums: Callable[[Any], Moments]
    """Result of ``run`` -> (Σ a aᵀ, Σ g gᵀ) of each layer, g of the summed loss."""


class Peer(Protocol):
    """The interface of a peer's module."""

    PACKAGE: str | None
    """The distribution whose version is recorded; None if it is part of this repository."""
    CONVENTION: str
    """The convention that has to be undone for plain sums."""
    POSITIONS: str
    """How the positions with a label are selected."""

    @staticmethod
    def prepare(model: nn.Module, batches: Sequence[Batch], layers: Sequence[str]) -> Fit:
        """Prepare a fit of ``layers`` of ``model``, which the peer may change."""


DROPPED = "drops the last of each sequence"
WITHOUT_LAST = "given sequences without their last token"


def load(name: str) -> Peer:
    """Import one of :data:`PEERS`."""
    peer: Any = import_module(f"peers.{name}")
    return peer


def without_last(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return inputs and their labels, each [sequences, length - 1]."""
    tokens = batch["input_ids"]
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy summed over positions."""
    return cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")


def train_only(model: nn.Module, layers: Sequence[str]) -> None:
    """Freeze all but the weights of ``layers``, for peers that need no other gradients."""
    model.requires_grad_(False)
    for name in layers:
        model.get_submodule(name).requires_grad_(True)


class Flat(nn.Module):
    """A causal model as a classifier of positions: tokens -> logits [positions, classes]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits.flatten(0, 1)


def flatten_rows(model: nn.Module, layers: Sequence[str]) -> None:
    """Flatten the inputs of the parents of ``layers`` to [rows, features]."""
    for parent in {model.get_submodule(name.rpartition(".")[0]) for name in layers}:
        parent.forward = _flattening(parent)


def _flattening(module: nn.Module) -> Callable[[Tensor], Tensor]:
    whole = type(module).forward
    return lambda x: whole(module, x.flatten(0, -2)).view(x.shape)
