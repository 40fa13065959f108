"""Edits of a model that are measured and undone, one after another."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import get_args

from torch import Tensor, nn

from curvfast.core.eigenbasis import Eigenbasis
from curvfast.core.importance import Importance, check, importance_frame, ranked, takes_corrections
from curvfast.core.rule import Rule
from curvfast.core.selection import Selection
from curvfast.core.staircase import used_ranks
from curvfast.edit_plan import editable_layers
from curvfast.editing import restore
from curvfast.errors import InputError
from curvfast.sweeps.frontier import SIZE, UNEDITED, SweepPoint
from curvfast.sweeps.rotations import Hold, Rotations

Measure = Callable[[nn.Module], Mapping[str, float]]
Size = tuple[float | None, float | None]
"""Share of the mass, or share of the pairs; the other is None."""


class Trials:
    """Edits of some layers of one model; between two of them its weights are the original bits."""

    def __init__(
        self,
        model: nn.Module,
        basis: Eigenbasis,
        names: Iterable[str],
        importances: Sequence[Importance],
        evaluate: Measure | Sequence[Measure],
        *,
        corrections: Mapping[str, Tensor] | None = None,
        seed: int = 0,
        hold: Hold = "device",
    ) -> None:
        """Check everything, and copy the weights.

        Args:
            model: The model the basis was measured on, unedited.
            basis: Eigenbases by layer name.
            names: Which layers may be edited.
            importances: Which will be asked for.
            evaluate: What to measure of an edited model: functions that return numbers by name.
            corrections: As in :func:`curvfast.select`; for those importances that take them.
            seed: For ``"random"``.
            hold: As of :class:`Rotations`.

        Raises:
            InputError: If an importance does not go with the basis or ``corrections``, a weight
                cannot be edited, or an argument is none of those that there are.
            BasisMismatch: If the basis is of another model.
            LayerNotFound: If ``corrections`` lack a layer, or a weight is shared with another
                module.
        """
        self.model = model
        self.basis = basis.restricted(names)
        self.corrections = corrections
        self.seed = seed
        self.evaluate = [evaluate] if callable(evaluate) else list(evaluate)
        self.layers = editable_layers(model, self.basis, None)
        if hold not in get_args(Hold):
            raise InputError(f"hold={hold!r}: pass one of {', '.join(get_args(Hold))}")
        if not self.evaluate or not all(callable(measure) for measure in self.evaluate):
            raise InputError(
                "evaluate= must be a function of the model that returns numbers by name, or several"
            )
        if corrections is not None and not any(map(takes_corrections, importances)):
            raise InputError("corrections= were given, and no importance= takes them")
        for importance in importances:
            check(importance, self.basis, self._corrections(importance))
        self.saved = {name: layer.stored().clone() for name, layer in self.layers.items()}
        self.rotations = Rotations(self.basis, self.weight, hold)

    def weight(self, name: str) -> Tensor:
        """Return W [d_out, d_in] of a layer as it is now."""
        return self.layers[name].matrix()

    def unedited(self) -> SweepPoint:
        """Measure the model as it is."""
        started = time.perf_counter()
        metrics = self._measured()
        seconds = time.perf_counter() - started
        return SweepPoint(UNEDITED, UNEDITED, (), None, None, 1.0, metrics, seconds)

    def point(
        self, importance: Importance, size: Size, layers: str, names: Sequence[str]
    ) -> SweepPoint:
        """Edit some layers, measure, and undo, also where measuring fails.

        Args:
            importance: What pairs are ranked by.
            size: How much to keep of each layer.
            layers: What the layers are called together.
            names: Theirs.

        Raises:
            InputError: If the size or the scores do not go with the basis, or what ``evaluate``
                returns is not numbers by name.
            ShapeError: If corrections are of another shape.
        """
        started = time.perf_counter()
        part = self.rotations.vectors(importance_frame(importance), names)
        selection = ranked(
            importance, part, self.weight, Rule(*size), corrections=self._corrections(importance),
            seed=self.seed, rotated=self.rotations.coefficients,
        )  # fmt: skip
        try:
            for name in names:
                self.layers[name].write(self.rotations.edited(name, selection[name]))
            metrics = self._measured()
        finally:
            restore((self.layers[name], self.saved[name]) for name in names)
        return SweepPoint(
            importance, layers, tuple(names), *size,
            kept_share(selection), metrics, time.perf_counter() - started,
        )  # fmt: skip

    def _corrections(self, importance: Importance) -> Mapping[str, Tensor] | None:
        return self.corrections if takes_corrections(importance) else None

    def _measured(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for measure in self.evaluate:
            own = measure(self.model)
            if not isinstance(own, Mapping):
                raise InputError(
                    f"evaluate= returned {type(own).__name__}, not numbers by name; of an "
                    "EvalReport pass to_dict()"
                )
            for name, value in own.items():
                if name in found or name == SIZE:
                    raise InputError(f"evaluate= returned {name!r}, which there is already")
                found[name] = _number(name, value)
        return found


def kept_share(selection: Selection) -> float:
    """Return the kept share of all pairs, or of all singular directions."""
    if selection.frame == "singular":
        # A block of r × r pairs is r directions: off its diagonal C is 0.
        kept = sum(used_ranks(own)[0] for own in selection.values())
        return kept / sum(min(own.shape) for own in selection.values())
    return sum(selection.pairs.values()) / sum(math.prod(own.shape) for own in selection.values())


def _number(name: str, value: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"evaluate= returned {value!r} for {name!r}, not a number") from error
    return number if math.isfinite(number) else math.nan
