"""Curvature: a running measurement of Kronecker factors."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from curvfast import distributed
from curvfast.collection.accumulator import factor_bytes, sum_bytes
from curvfast.collection.config import CollectConfig
from curvfast.collection.factor_sums import FactorSums
from curvfast.collection.measurement import Measurement
from curvfast.collection.refusal import OnError
from curvfast.collection.uncovered import warn_few_rows
from curvfast.collection.verdict import Energy
from curvfast.kfac.factors import Factors
from curvfast.kfac.layer_factors import LayerFactors
from curvfast.model.families import LinearLayer
from curvfast.model.layers import LayerSpec, are_kinds, select
from curvfast.model.rows import RowRule

log = logging.getLogger(__name__)


class Curvature(Measurement):
    """A running measurement of Kronecker factors, yielded by :func:`collect`."""

    _sums: FactorSums

    def __init__(
        self,
        model: nn.Module,
        config: CollectConfig,
        layers: LayerSpec | dict[str, LinearLayer],
        *,
        rows: RowRule | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        driven: bool = False,
        halves: bool = False,
        group: distributed.Group = None,
        one_of_many: bool = False,
        facts: Mapping[str, Any] | None = None,
        on_error: OnError | None = None,
    ) -> None:
        """Register the hooks; :func:`collect` describes the arguments.

        ``layers`` may be chosen before. With ``one_of_many``, other passes measure other layers:
        here there may be no rows at all. With ``on_error``, which must not raise, a refusal inside
        a hook is handed to it and ends the measurement, not the loop; ``factors()`` raises it.
        """
        chosen = layers if isinstance(layers, dict) else select(model, layers)
        self._sums = FactorSums(chosen, config, halves)
        self._result: Factors | None = None
        copies = 2 if config.marginals else 1
        self._bytes = copies * sum_bytes(chosen)
        log.info(
            "collecting %d layers: the sums will need at most %.1f MB, the factors %.1f MB",
            len(chosen), self._bytes / 1e6, copies * factor_bytes(chosen) / 1e6,
        )  # fmt: skip
        super().__init__(
            model, config, chosen, rows=rows, grad_scaler=grad_scaler, driven=driven, group=group,
            one_of_many=one_of_many, facts=facts, parts=self._sums.parts, on_error=on_error,
            # A weight of either side is the norm of the other, so both must be there.
            inputs_first=not config.marginals,
            by_kind=not isinstance(layers, dict) and are_kinds(layers),
        )  # fmt: skip

    def factors(self) -> Factors:
        """Return the factors of everything summed so far, on all ranks together.

        With a process group every rank must call this, and gets the same.

        Returns:
            A snapshot while collecting; after the ``with`` block, the same object on every call.
            Experts that no counted token was routed to are left out, with a warning.

        Raises:
            EvidenceError: If which rows count, or the unit of G, is neither proven nor told, or
                the gradients contradict it; the message says what to pass.
            CoverageError: If a chosen layer got no rows, or its inputs and gradients do not belong
                to the same rows; the message says which and why.
            NonFiniteError: With ``on_nonfinite="error"``, if something was not finite.
            DistributedError: If another rank is gone.
        """
        if self._result is not None:
            return self._result
        group = self._group
        sums: FactorSums = self._added_up(final=not self._active)
        layers = sums.factors()
        verdict = self._judged(lambda name: _energy(layers.get(name)), group)
        idle = self._require(sums)
        warn_few_rows(layers)
        factors = Factors(layers, self._provenance(idle, verdict))
        if not self._active:
            self._result = factors
            self._sums.release()
        return factors

    def halves(self) -> tuple[Factors, Factors]:
        """Return A and G of each half of the batches, without layers that got no rows.

        With a process group every rank must call this.
        """
        sums: FactorSums = self._added_up(final=False)
        return Factors(sums.factors(0)), Factors(sums.factors(1))


def _energy(layer: LayerFactors | None) -> Energy:
    if layer is None:
        return Energy(0.0, 0.0, 0)
    return Energy(float(layer.a_sum.trace()), float(layer.g_sum.trace()), layer.rows_g)
