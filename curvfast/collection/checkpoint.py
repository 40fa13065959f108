"""Checkpoints of a collection: two slots written alternately, so that one is always complete."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from curvfast import storage
from curvfast.errors import FormatError, NumericalWarning, StorageError

KIND = "curvfast-checkpoint"
_SLOTS = ("slot-0", "slot-1")
State = tuple[dict[str, Any], dict[str, Tensor]]


class Checkpoint:
    """A checkpoint folder with the last two states of one collection."""

    def __init__(self, directory: str | PathLike[str], identity: Mapping[str, Any]) -> None:
        """Store the folder's path; nothing is read or written yet.

        Args:
            directory: Created by the first :meth:`save`.
            identity: JSON-able identity of the collection; the state of another one is refused.
        """
        self._folder = Path(directory)
        self._identity = dict(identity)
        self._next = 0

    def load(self) -> State | None:
        """Return the newest complete state, or None if there is none yet.

        A damaged state is skipped with a warning, and the one before it is returned.

        Raises:
            FormatError: If the folder holds something else, or a newer format.
            StorageError: If it is of another collection, or none of its states is complete.
        """
        if not self._folder.exists() or not any(self._folder.iterdir()):
            return None
        found: dict[int, State] = {}
        damages = []
        for number, slot in enumerate(_SLOTS):
            if (self._folder / slot).exists():
                try:
                    found[number] = storage.read_folder(self._folder / slot, kind=KIND)
                except FormatError:
                    raise
                except StorageError as error:
                    damages.append(str(error))
        if not found and not damages:
            raise FormatError(
                f"{str(self._folder)!r} is not empty and holds no checkpoint; pass checkpoint= an "
                "empty folder, or one of an earlier run"
            )
        if not found:
            raise StorageError(
                "no whole checkpoint is left; remove the folder to start anew:\n  "
                + "\n  ".join(damages)
            )
        newest = max(found, key=lambda number: found[number][0]["state"]["batches"])
        facts, tensors = found[newest]
        self._require_same(facts["identity"])
        if damages:
            warnings.warn(
                f"one state of the checkpoint is damaged ({damages[0]}); going on from the other, "
                f"after {facts['state']['batches']} batches",
                NumericalWarning,
                stacklevel=3,
            )
        self._next = 1 - newest
        return facts["state"], tensors

    def save(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write a state over the older of the two.

        Args:
            facts: JSON-able, with ``batches``: how many were counted.
            tensors: By key.

        Raises:
            StorageError: If it cannot be written; the previous state stays complete.
        """
        storage.write_folder(
            self._folder / _SLOTS[self._next],
            kind=KIND,
            meta={"identity": self._identity, "state": dict(facts)},
            tensors=tensors,
        )
        self._next = 1 - self._next

    def _require_same(self, identity: Mapping[str, Any]) -> None:
        differing = [k for k in self._identity if identity.get(k) != self._identity[k]]
        if differing:
            listing = "\n  ".join(
                f"{key}: {identity.get(key)!r} there, {self._identity[key]!r} now"
                for key in differing
            )
            raise StorageError(
                f"the checkpoint in {str(self._folder)!r} is of another collection; pass the "
                f"arguments it was made with, or another folder. What differs:\n  {listing}"
            )
