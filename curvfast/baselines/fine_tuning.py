"""Trial weights fine-tuned by AdamW."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from curvfast.baselines.subject import ForgetModel, wide


class FreeWeights:
    """Float32 copies of the weights, trained by AdamW, and rounded to the layers' dtypes when used.

    They take 16 bytes a weight.
    """

    def __init__(self, subject: ForgetModel, *, learning_rate: float, weight_decay: float) -> None:
        """Start from the model's own weights."""
        own = subject.weights()
        self._dtypes = {name: weight.dtype for name, weight in own.items()}
        self._copies = {n: w.to(wide(w), copy=True) for n, w in own.items()}
        self._optimizer = torch.optim.AdamW(
            self._copies.values(), lr=learning_rate, weight_decay=weight_decay
        )

    def weights(self) -> dict[str, Tensor]:
        """Return the copies in the stored dtypes."""
        return {name: copy.to(self._dtypes[name]) for name, copy in self._copies.items()}

    def step(self, found: Mapping[str, Tensor]) -> None:
        """Take a step of AdamW."""
        for name, copy in self._copies.items():
            copy.grad = found[name]
        self._optimizer.step()
