"""Trials: edits of a model that are measured and undone, one after another."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, get_args

from torch import Tensor, nn

from curvfast.editing.edit import restore
from curvfast.editing.plan import editable_layers
from curvfast.errors import InputError
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.kfac.importance import (
    Importance,
    check,
    importance_frame,
    ranked,
    singular_vectors,
    takes_corrections,
)
from curvfast.kfac.projection import kept_part, project, rotate
from curvfast.kfac.selection.kept_pairs import Frame, Selection
from curvfast.kfac.selection.mask import Mask
from curvfast.kfac.selection.rule import Rule
from curvfast.kfac.selection.staircase import Staircase, used_ranks
from curvfast.sweeps.frontier import SIZE, UNEDITED, SweepPoint

Hold = Literal["device", "cpu", "anew"]
"""Where C = U_Gᵀ W U_A is cached between edits: beside W, on the CPU, or not at all."""


class Rotations:
    """Cache of the coefficients C of a model's layers, in one frame at a time."""

    def __init__(
        self, basis: Eigenbasis, weights: Callable[[str], Tensor], hold: Hold = "device"
    ) -> None:
        """Create an empty cache.

        Args:
            basis: The eigenbasis of the layers.
            weights: Layer name -> W [d_out, d_in]; must be unedited whenever it is called.
            hold: Where C is cached, [d_out, d_in] float32, or float64 if W is.
        """
        self._given, self._weights, self._hold = basis, weights, hold
        self._frame: Frame | None = None
        self._vectors: Eigenbasis | None = None
        self._held: dict[str, Tensor] = {}

    def vectors(self, frame: Frame, names: Iterable[str]) -> Eigenbasis:
        """Return the vectors of a frame for some layers; singular vectors are computed when needed.

        Args:
            frame: Frame of the pairs; ``"standard"`` has no vectors: the given basis is returned.
            names: Names of the layers.
        """
        if frame != self._frame:
            self._frame, self._vectors = frame, None
            self._held.clear()
        if frame in ("standard", self._given.frame):
            return self._given.restricted(names)
        found = dict(self._vectors or {})
        found |= {n: singular_vectors(self._weights(n)) for n in names if n not in found}
        self._vectors = Eigenbasis(found, frame=frame)
        return self._vectors.restricted(names)

    def coefficients(self, name: str) -> Tensor:
        """Return C of a layer in the frame of the last :meth:`vectors` call."""
        if name in self._held:
            return self._held[name].to(self._weights(name).device)
        found = rotate(self._weights(name), self._basis()[name])
        if self._hold != "anew":
            self._held[name] = found.cpu() if self._hold == "cpu" else found
        return found

    def edited(self, name: str, selection: Staircase | Mask) -> Tensor:
        """Return W', the part of a layer's W that is selected, in the working dtype."""
        if self._frame == "standard":
            return project(self._weights(name), None, selection).weight
        return kept_part(self.coefficients(name), self._basis()[name], selection)

    def _basis(self) -> Eigenbasis:
        return self._given if self._vectors is None else self._vectors


Measure = Callable[[nn.Module], Mapping[str, float]]
Size = tuple[float | None, float | None]
"""(mass, fraction): share of the mass or of the pairs; the other is None."""


class Trials:
    """Trial edits of one model's layers; between two of them its weights are the original bits."""

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
            importances: The importances to be used.
            evaluate: Measures of an edited model: functions that return numbers by name.
            corrections: As in :func:`curvfast.select`; for those importances that take them.
            seed: Seed of ``"random"``.
            hold: Where C is cached between edits; see :class:`Rotations`.

        Raises:
            InputError: If an importance does not go with the basis or ``corrections``, a weight
                cannot be edited, or an argument is unknown.
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
        """Edit some layers, measure, and undo, also if measuring fails.

        Args:
            importance: The importance that ranks pairs.
            size: How much to keep of each layer.
            layers: Title of the set of layers.
            names: Names of its layers.

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
