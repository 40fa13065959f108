"""dattri: ``estimate_covariance``, the first step of its EK-FAC attributor.

Its covariances of 3-D activations fail (UnboundLocalError: a_prev), so positions are its samples:
the MLPs are called on flattened rows. The hook caches what the attributor's own, which cannot be
called without an eigendecomposition, caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dattri.func.fisher import estimate_covariance
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from peers import WITHOUT_LAST, Batch, Fit, Flat, Moments, flatten_rows, train_only, without_last

PACKAGE = "dattri"
CONVENTION = "means over samples, of a loss that is a mean and that it multiplies back"
POSITIONS = WITHOUT_LAST + ", in flattened rows: it takes no 3-D activations"


def prepare(model: nn.Module, batches: Sequence[Batch], layers: Sequence[str]) -> Fit:
    flatten_rows(model, layers)
    train_only(model, layers)
    flat, pairs = Flat(model), [without_last(batch) for batch in batches]
    shape, rows = pairs[0][0].shape, sum(tokens.numel() for tokens, _ in pairs)
    samples = [(tokens.flatten(), labels.flatten()) for tokens, labels in pairs]

    def mean_loss(sample: tuple[Tensor, Tensor]) -> Tensor:
        tokens, labels = sample
        return cross_entropy(flat(tokens.view(shape)), labels)

    def run() -> Any:
        cache: dict[str, tuple[Tensor, Tensor]] = {}

        def keep(name: str, inputs: tuple[Tensor], output: Tensor) -> None:
            output.retain_grad()
            cache[name] = (inputs[0], output)

        handles = [
            model.get_submodule(name).register_forward_hook(lambda _m, x, y, n=name: keep(n, x, y))
            for name in layers
        ]
        try:
            return estimate_covariance(mean_loss, samples, cache)
        finally:
            for handle in handles:
                handle.remove()

    def sums(found: Any) -> Moments:
        return {name: tuple(factor * rows for factor in found[name]) for name in layers}

    return Fit(run, sums)
