"""Weights in the vectors that pairs are of: each is rotated once, however often it is edited."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from torch import Tensor

from curvfast.core.eigenbasis import Eigenbasis
from curvfast.core.mask import Mask
from curvfast.core.projection import kept_part, project, rotate
from curvfast.core.selection import Frame
from curvfast.core.singular import singular_vectors
from curvfast.core.staircase import Staircase

Hold = Literal["device", "cpu", "anew"]
"""Where C = U_Gᵀ W U_A is between edits: beside W, on the CPU, or nowhere, and computed anew."""


class Rotations:
    """C of the layers of a model, in the vectors of one frame at a time."""

    def __init__(
        self, basis: Eigenbasis, weights: Callable[[str], Tensor], hold: Hold = "device"
    ) -> None:
        """Rotate nothing yet.

        Args:
            basis: Of the layers.
            weights: Layer name -> W [d_out, d_in], unedited whenever a layer is asked for.
            hold: Where C is meanwhile, [d_out, d_in] float32, or float64 if W is.
        """
        self._given, self._weights, self._hold = basis, weights, hold
        self._frame: Frame | None = None
        self._vectors: Eigenbasis | None = None
        self._held: dict[str, Tensor] = {}

    def vectors(self, frame: Frame, names: Iterable[str]) -> Eigenbasis:
        """Return the vectors that pairs of some layers are of; those of W are found when needed.

        Args:
            frame: What pairs are of; ``"standard"`` has no vectors: the basis as it was given.
            names: Of the layers.
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
        """Return C of a layer in the vectors of the frame that was asked for last."""
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
