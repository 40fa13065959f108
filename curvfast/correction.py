"""Correction: a running measurement of the EK-FAC correction."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from curvfast import distributed
from curvfast.adapters import LinearLayer
from curvfast.capture import Arrival
from curvfast.config import CollectConfig
from curvfast.core.corrections import Corrections
from curvfast.core.eigenbasis import Eigenbasis
from curvfast.correction_sums import CorrectionSums, bytes_of
from curvfast.measurement import Measurement
from curvfast.rows import RowRule

log = logging.getLogger(__name__)


class Correction(Measurement):
    """A running measurement of the EK-FAC correction, yielded by :func:`collect_corrections`."""

    _sums: CorrectionSums

    def __init__(
        self,
        model: nn.Module,
        config: CollectConfig,
        basis: Eigenbasis,
        layers: dict[str, LinearLayer],
        per: str,
        *,
        rows: RowRule | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        driven: bool = False,
        group: distributed.Group = None,
        one_of_many: bool = False,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Register the hooks; :func:`collect_corrections` describes the arguments.

        ``layers`` are layers of the basis. With ``one_of_many``, other passes measure the rest.
        """
        self._per = per
        self._bytes = bytes_of(Eigenbasis({name: basis[name] for name in layers}))
        self._sums = CorrectionSums(layers, basis, per, config.spill_every)
        self._result: Corrections | None = None
        log.info(
            "measuring the corrections of %d layers: their sums need %.1f MB",
            len(layers), self._bytes / 1e6,
        )  # fmt: skip
        super().__init__(
            model, config, layers, rows=rows, grad_scaler=grad_scaler, driven=driven, group=group,
            one_of_many=one_of_many, facts=facts, on_input=None,
        )  # fmt: skip

    def corrections(self) -> Corrections:
        """Return the corrections of everything summed so far, on all ranks together.

        With a process group every rank must call this, and gets the same.

        Returns:
            A snapshot while collecting; after the ``with`` block, the same object on every call.
            Experts that no counted token was routed to are left out, with a warning.

        Raises:
            CoverageError: If a chosen layer got no rows; the message says which and why.
            DistributedError: If another rank is gone.
        """
        if self._result is not None:
            return self._result
        final = not self._active
        sums: CorrectionSums = self._added_up(final=final)
        idle = self._require(sums)
        layers = (sums if final else sums.copy()).corrections()
        found = Corrections(layers, self._per, {**self._provenance(idle), "per": self._per})
        if final:
            self._result = found
            self._sums.release()
        return found

    def _count(self, arrival: Arrival, unit: float) -> None:
        self._sums.add(arrival, unit)

    def _sum_bytes(self) -> int:
        return self._bytes
