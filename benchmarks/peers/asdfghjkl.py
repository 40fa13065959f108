"""asdfghjkl (ASDL): an empirical Fisher of Kronecker shape, accumulated over batches."""

from __future__ import annotations

from collections.abc import Sequence

from asdl.fisher import FisherConfig, get_fisher_maker
from asdl.matrices import FISHER_EMP, SHAPE_KRON
from torch import nn
from torch.nn.functional import cross_entropy

from peers import WITHOUT_LAST, Batch, Fit, Flat, Moments, train_only, without_last

PACKAGE = "asdfghjkl"
CONVENTION = "sums over a data size that the user gives: 1 here"
POSITIONS = WITHOUT_LAST


def prepare(model: nn.Module, batches: Sequence[Batch], layers: Sequence[str]) -> Fit:
    train_only(model, layers)
    modules = {name: model.get_submodule(name) for name in layers}
    flat, pairs = Flat(model), [without_last(batch) for batch in batches]
    shapes = [(module, SHAPE_KRON) for module in modules.values()]
    maker = get_fisher_maker(flat, FisherConfig(FISHER_EMP, shapes, data_size=1))

    def run() -> None:
        maker.zero_fisher()
        for tokens, labels in pairs:
            logits = maker.setup_model_call(flat, tokens)
            # It makes the loss a sum by itself.
            maker.setup_loss_call(cross_entropy, logits, labels.flatten())
            maker.forward_and_backward(accumulate=True)

    def sums(_: None) -> Moments:
        return {name: (m.fisher.kron.A, m.fisher.kron.B) for name, m in modules.items()}

    return Fit(run, sums)
