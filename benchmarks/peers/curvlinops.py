"""curvlinops: ``KFACLinearOperator``, spared the walks over the data that check and count it."""

from __future__ import annotations

from collections.abc import Sequence

from curvlinops import FisherType, KFACLinearOperator
from torch import nn

from peers import WITHOUT_LAST, Batch, Fit, Flat, Moments, without_last

PACKAGE = "curvlinops-for-pytorch"
CONVENTION = "A is a mean over positions, G a plain sum"
POSITIONS = WITHOUT_LAST


def prepare(model: nn.Module, batches: Sequence[Batch], layers: Sequence[str]) -> Fit:
    pairs = [without_last(batch) for batch in batches]
    data = [(tokens, labels.flatten()) for tokens, labels in pairs]
    sequences, length = sum(len(tokens) for tokens, _ in pairs), pairs[0][0].shape[1]

    def run() -> KFACLinearOperator:
        operator = KFACLinearOperator(
            Flat(model), nn.CrossEntropyLoss(reduction="sum"),
            [model.get_submodule(name).weight for name in layers], data,
            fisher_type=FisherType.EMPIRICAL, check_deterministic=False,
            num_data=sequences, num_per_example_loss_terms=length,
        )  # fmt: skip
        operator.compute_kronecker_factors()
        return operator

    def sums(found: KFACLinearOperator) -> Moments:
        a, g = found._input_covariances, found._gradient_covariances
        return {n: (a[f"model.{n}"] * sequences * length, g[f"model.{n}"]) for n in layers}

    return Fit(run, sums)
