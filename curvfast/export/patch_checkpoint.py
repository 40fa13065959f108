"""Application of a patch to a checkpoint on disk, tensor by tensor, without building the model."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from os import PathLike
from pathlib import Path

import numpy as np

from curvfast.errors import PatchMismatch
from curvfast.export.fingerprint import Fingerprint
from curvfast.export.patch import LayerPatch, Patch
from curvfast.storage import TensorPlace, copied, tensor_places


def patch_checkpoint(
    patch: Patch,
    model: str | PathLike[str],
    out: str | PathLike[str] | None = None,
    *,
    revert: bool = False,
) -> None:
    """Apply a patch to the folder of a checkpoint, or revert it.

    Only the bytes of edited weights change: applied and reverted, each file is as it was.
    Everything is checked before the first write, and the folder is replaced atomically.

    Args:
        patch: The patch.
        model: A folder that ``save_pretrained`` wrote: safetensors, in one file or many.
        out: A new folder; None replaces the old one.
        revert: Whether to revert the patch.

    Raises:
        PatchMismatch: If a weight is not the one it must be, or not stored by itself.
        StorageError: If the folder is no checkpoint, or ``out`` is there or cannot be written.
    """
    folder = Path(model)
    places = _places_of(patch, tensor_places(folder))
    found = {
        name: Fingerprint(place.dtype, place.shape, sha256(place.read(folder)).hexdigest())
        for name, place in places.items()
    }
    patch.require(found, revert=revert)
    change = LayerPatch.reverted if revert else LayerPatch.applied
    with copied(folder, folder if out is None else out) as copy:
        for name, place in places.items():
            width = len(patch.layers[name].planes)
            bits = np.frombuffer(place.read(folder), f"<u{width}").astype(f"u{width}", copy=False)
            new = change(patch.layers[name], bits)
            place.overwrite(copy, new.astype(f"<u{width}", copy=False).tobytes())


def _places_of(patch: Patch, there: Mapping[str, TensorPlace]) -> dict[str, TensorPlace]:
    places = {}
    for name, layer in patch.layers.items():
        wanted = layer.tensor
        # Names in checkpoints of a base model lack the first component, or have one more.
        alike = [k for k in there if k.endswith(f".{wanted}") or wanted.endswith(f".{k}")]
        found = [wanted] if wanted in there else alike
        if len(found) != 1:
            raise PatchMismatch(
                f"the checkpoint holds no tensor {wanted!r}, the weight of layer {name!r}: "
                "made of another model, or stored in another form than in memory. Load it by "
                "from_pretrained, and use patch.apply(model) and model.save_pretrained"
            )
        place = there[found[0]]
        places[name] = place if layer.expert is None else place.row(layer.expert)
    return places
