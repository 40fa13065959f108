"""Selections of eigenpairs that ignore curvature."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from torch import nn

from curvfast.baselines.report import ForgetReport
from curvfast.baselines.subject import Subject, choose
from curvfast.core.eigenbasis import Eigenbasis
from curvfast.core.selection import Selection
from curvfast.editing import edit
from curvfast.errors import LayerNotFound
from curvfast.layers import LayerSpec
from curvfast.selecting import select


@dataclass(frozen=True, eq=False)
class RandomPairs:
    """Keeps as many eigenpairs of a basis as a selection does, chosen uniformly at random."""

    basis: Eigenbasis
    like: Selection
    """Gives the numbers of pairs."""

    def forget(
        self,
        model: nn.Module,
        memorized: Any = None,
        clean: Any = None,
        layers: LayerSpec = "mlp",
        *,
        seed: int = 0,
        progress: bool = True,
    ) -> ForgetReport:
        """Project the weights on the chosen pairs, as :class:`~.rival.Rival` says.

        Args:
            model: As there.
            memorized: Not looked at.
            clean: Not looked at.
            layers: As there; of those the layers that the basis has.
            seed: As there.
            progress: Not looked at.

        Returns:
            What changed.

        Raises:
            LayerNotFound: If the basis has none of ``layers``.
        """
        started = time.perf_counter()
        meant = choose(model, layers)
        here = {name: layer for name, layer in meant.layers.items() if name in self.basis}
        if not here:
            raise LayerNotFound(
                f"layers={layers!r} means no layer of the basis: {', '.join(map(repr, self.basis))}"
            )
        subject = Subject(meant.model, here)
        part = self.basis.restricted(here)
        pairs = {name: self.like[name].pairs for name in here}
        kept = select(subject.model, part, "random", pairs=pairs, seed=seed)
        changes = subject.rewrite(lambda: edit(subject.model, part, selection=kept))
        settings = {"pairs": pairs}
        return ForgetReport("RandomPairs", settings, changes, time.perf_counter() - started)
