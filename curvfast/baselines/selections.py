"""RandomPairs: a random selection of eigenpairs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from curvfast.baselines.rival import Baseline, ForgetTask, Trained
from curvfast.baselines.subject import ForgetModel
from curvfast.core.eigenbasis import Eigenbasis
from curvfast.core.selection import Selection
from curvfast.editing import edit
from curvfast.errors import LayerNotFound
from curvfast.selecting import select


@dataclass(frozen=True, eq=False)
class RandomPairs(Baseline):
    """Keeps as many eigenpairs of a basis as a selection does, chosen uniformly at random.

    Only layers that the basis has are changed; it reads no text.
    """

    basis: Eigenbasis
    like: Selection
    """Gives the numbers of pairs."""

    def _train(self, task: ForgetTask) -> Trained:
        model, meant = task.subject.model, task.subject.layers
        here = {name: layer for name, layer in meant.items() if name in self.basis}
        if not here:
            raise LayerNotFound(
                f"layers= means no layer of the basis, which has {', '.join(map(repr, self.basis))}"
            )
        part = self.basis.restricted(here)
        pairs = {name: self.like[name].pairs for name in here}
        kept = select(model, part, "random", pairs=pairs, seed=task.seed)
        subject = ForgetModel(model, here)
        return Trained(subject.rewrite(lambda: edit(model, part, selection=kept)))

    def _settings(self, layers: Iterable[str]) -> dict[str, Any]:
        return {"pairs": {name: self.like[name].pairs for name in layers}}
