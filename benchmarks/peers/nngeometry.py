"""nngeometry: ``PMatKFAC`` of a function that is each sequence's loss.

It takes inputs that are differentiable and activations that are [rows, features], so tokens come
with a zero to be added to their embeddings, and the MLPs are called on flattened rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from nngeometry.backend import TorchHooksJacobianBackend
from nngeometry.layercollection import LayerCollection
from nngeometry.object.pspace import PMatKFAC
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from peers import WITHOUT_LAST, Batch, Fit, Moments, flatten_rows, without_last

PACKAGE = "nngeometry"
CONVENTION = "A and G are sums over the number of sequences"
POSITIONS = WITHOUT_LAST + ", in flattened rows: it takes no 3-D activations"


def prepare(model: nn.Module, batches: Sequence[Batch], layers: Sequence[str]) -> Fit:
    flatten_rows(model, layers)
    pairs = [without_last(batch) for batch in batches]
    tokens, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
    data = TensorDataset(torch.zeros(len(tokens), 1, 1), tokens, labels)
    loader = DataLoader(data, batch_size=len(pairs[0][0]))
    collection = LayerCollection()
    for name in layers:
        collection.add_layer_from_model(model, model.get_submodule(name))

    def losses(zero: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
        embedded = model.get_input_embeddings()(tokens) + zero
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        return cross_entropy(logits.mT, labels, reduction="none").sum(1, keepdim=True)

    def run() -> PMatKFAC:
        backend = TorchHooksJacobianBackend(model, losses, layer_collection=collection)
        return PMatKFAC(generator=backend, examples=loader)

    def sums(found: PMatKFAC) -> Moments:
        scale = len(tokens)
        return {name: tuple(factor * scale for factor in found.data[name]) for name in layers}

    return Fit(run, sums)
