"""Patch: an edit as a separate file, which can be applied to its original weights and reverted.

It holds the difference of the bits as the model stores them, so both ways are exact in every dtype,
and the hashes of the weights on either side, so it fits nothing else; those of the factors and of
the selection record its origin. Its size depends on the size of the
change: for weights that change by 30 % (in Frobenius norm) it is 0.62 of the edited weights in
bfloat16, 0.78 in float16 and 0.81 in float32; by 1 %, 0.29, 0.50 and 0.65.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from curvfast import storage
from curvfast.distributed import gathered, write_
from curvfast.editing.edit import restore
from curvfast.editing.plan import EditArguments, plan_edit
from curvfast.editing.report import EditReport
from curvfast.errors import InputError, PatchMismatch
from curvfast.export.bit_difference import (
    Bits,
    backward,
    bits_of,
    compress,
    decompress,
    difference,
    forward,
    with_bits,
)
from curvfast.export.fingerprint import Fingerprint, digest_of, fingerprint_of, require
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.kfac.selection.mask import Mask
from curvfast.kfac.selection.staircase import Staircase
from curvfast.model.families import ExpertLayer, LinearLayer
from curvfast.model.layers import linear_layers, refuse_tied

KIND = "curvfast-patch"


@dataclass(frozen=True)
class LayerPatch:
    """The difference of one layer's weight, as it is stored."""

    tensor: str
    """Its name in the model's state."""
    expert: int | None
    """Index of the slice of a stacked tensor of experts; None: the whole tensor."""
    before: Fingerprint
    after: Fingerprint
    factors: str
    """SHA-256 of the eigenvalues of G and A, which identifies the factors."""
    kept: str
    """SHA-256 of the selection: a staircase's widths, or a mask."""
    planes: tuple[bytes, ...] = field(repr=False)
    """The compressed bytes, from :func:`curvfast.export.bit_difference.compress`."""

    def applied(self, bits: Bits) -> Bits:
        """Return the edited weight's bits from those of the weight."""
        return forward(bits, decompress(self.planes, len(bits)))

    def reverted(self, bits: Bits) -> Bits:
        """Return the weight's bits from those of the edited weight."""
        return backward(bits, decompress(self.planes, len(bits)))


@dataclass(frozen=True, eq=False)
class Patch:
    """An edit of some layers, stored separately from the model; see :func:`make_patch`."""

    layers: Mapping[str, LayerPatch]
    report: EditReport
    """The edit: pairs, mass and change of each layer, strength, model, rule and factors."""

    @property
    def nbytes(self) -> int:
        """Bytes the differences take, in memory and on disk."""
        return sum(len(plane) for layer in self.layers.values() for plane in layer.planes)

    def apply(self, model: nn.Module) -> None:
        """Edit the model in place, to the bits that :func:`curvfast.edit` would have written.

        Everything is checked before the first weight is written. Weights sharded by FSDP2 are
        gathered layer by layer, which every rank must then do.

        Raises:
            PatchMismatch: If a weight is not the one the patch was made from, or is patched
                already.
            InputError: If a weight is stored quantised, or laid out in a way that is not supported.
            LayerNotFound: If a layer shares its weight with another module.
        """
        self._write(model, revert=False)

    def revert(self, model: nn.Module) -> None:
        """Revert the edit, bit for bit; checked as :meth:`apply` is.

        Raises:
            PatchMismatch: If a weight is not the one that the patch produced.
            InputError: If a weight is stored quantised, or laid out in a way that is not supported.
            LayerNotFound: If a layer shares its weight with another module.
        """
        self._write(model, revert=True)

    def require(self, found: Mapping[str, Fingerprint], *, revert: bool) -> None:
        """Raise unless the weights are those that the patch was made from, or that it produced.

        Args:
            found: The fingerprint of every layer of the patch.
            revert: Whether to compare with those that it produced.

        Raises:
            PatchMismatch: If one is not.
        """
        before = {name: layer.before for name, layer in self.layers.items()}
        after = {name: layer.after for name, layer in self.layers.items()}
        source = self.report.provenance.get("model", {}).get("name")
        require(found, before, after, source, revert=revert)

    def save(self, directory: str | PathLike[str]) -> None:
        """Write the patch to a folder, atomically; called on one rank.

        Raises:
            StorageError: If it cannot be written.
        """
        layers, planes = {}, {}
        for name, layer in self.layers.items():
            keys = [f"{name}.{i}" for i in range(len(layer.planes))]
            for key, plane in zip(keys, layer.planes, strict=True):
                planes[key] = torch.frombuffer(bytearray(plane), dtype=torch.uint8)
            layers[name] = {
                "tensor": layer.tensor, "expert": layer.expert, "before": asdict(layer.before),
                "after": asdict(layer.after), "factors": layer.factors, "kept": layer.kept,
                "planes": keys,
            }  # fmt: skip
        meta = {"layers": layers, "edit": self.report.to_dict()}
        storage.write_folder(directory, kind=KIND, meta=meta, tensors=planes)

    @classmethod
    def load(cls, directory: str | PathLike[str]) -> Patch:
        """Read what :meth:`save` wrote.

        Raises:
            StorageError: If the folder is missing, foreign, damaged, or of a newer format.
        """
        meta, tensors = storage.read_folder(directory, kind=KIND)
        layers = {
            name: LayerPatch(
                entry["tensor"], entry["expert"], _fingerprint(entry["before"]),
                _fingerprint(entry["after"]), entry["factors"], entry["kept"],
                tuple(tensors[key].numpy().tobytes() for key in entry["planes"]),
            )
            for name, entry in meta["layers"].items()
        }  # fmt: skip
        return cls(layers, EditReport.from_dict(meta["edit"]))

    def _write(self, model: nn.Module, *, revert: bool) -> None:
        there = linear_layers(model)
        missing = [name for name in self.layers if name not in there]
        if missing:
            raise PatchMismatch(
                f"the patch has layer {missing[0]!r} and {len(missing) - 1} more that this "
                f"{type(model).__name__} lacks: it was made of another model"
            )
        refuse_tied(model, {name: there[name] for name in self.layers})
        found = {}
        for name in self.layers:
            there[name].require_editable()
            found[name] = fingerprint_of(gathered(there[name].stored()))
        self.require(found, revert=revert)
        change = LayerPatch.reverted if revert else LayerPatch.applied
        for name, patch in self.layers.items():
            stored = there[name].stored()
            whole = gathered(stored)
            write_(stored, with_bits(whole, change(patch, bits_of(whole))))


def make_patch(model: nn.Module, basis: Eigenbasis, **options: Unpack[EditArguments]) -> Patch:
    """Return what :func:`curvfast.edit` would do, as a patch; the model stays as it is.

    It raises what that raises.

    Args:
        model: The model the basis was measured on, in the dtype the patch is meant for.
        basis: Eigenbases by layer name.
        options: ``mass``, ``layers``, ``fraction``, ``pairs``, ``selection``, ``importance``,
            ``corrections`` and ``strength``, as in :func:`curvfast.edit`.

    Returns:
        The patch, with the report of the edit.
    """
    plan = plan_edit(model, basis, **options)
    layers, entries = {}, []
    for step, (layer, new, entry) in zip(plan.steps, plan.evaluated(), strict=True):
        before, after = gathered(layer.stored()), layer.as_stored(new)
        change = compress(difference(bits_of(before), bits_of(after)))
        layers[layer.name] = LayerPatch(
            *_tensor_of(layer), fingerprint_of(before), fingerprint_of(after),
            digest_of(step.basis.values_g, step.basis.values_a), _digest_of_kept(step.kept),
            tuple(change),
        )  # fmt: skip
        entries.append(entry)
    return Patch(layers, plan.report(entries))


def _fingerprint(entry: Mapping[str, Any]) -> Fingerprint:
    return Fingerprint(entry["dtype"], tuple(entry["shape"]), entry["sha256"])


def _tensor_of(layer: LinearLayer) -> tuple[str, int | None]:
    if isinstance(layer, ExpertLayer):
        module = layer.name.removesuffix(f"{layer.expert}.{layer.leaf}")
        return f"{module}{layer.leaf}", layer.expert
    return f"{layer.name}.{layer.leaf}" if layer.name else layer.leaf, None


def _digest_of_kept(kept: Staircase | Mask) -> str:
    return digest_of(kept.widths if isinstance(kept, Staircase) else kept.kept)


@contextmanager
def patched(model: nn.Module, patches: Sequence[Patch], *, strength: float = 1.0) -> Iterator[None]:
    """Apply patches inside a ``with`` block; afterwards the weights are the same, bit for bit.

    The patched weights are held twice inside the block.

    Args:
        model: The model the patches were made of, in their dtype; changed in place.
        patches: Applied in this order, each to the result of those before it.
        strength: α, of W + α (W' − W) with W' the result of all patches: 1 is W' to the bit, 0
            leaves every bit, below 0 what they remove is amplified.

    Yields:
        Nothing.

    Raises:
        InputError: If the strength is not finite, or a weight is quantised or of another layout.
        PatchMismatch: If a weight is not the one that a patch was made from.
        LayerNotFound: If a layer shares its weight with another module.
    """
    if not math.isfinite(strength):
        raise InputError(
            f"strength={strength}: pass the α of W + α (W' − W), such as 1 for the patches, 0.5 "
            "for half of them, or a negative number to amplify what they remove"
        )
    there = linear_layers(model)
    names = dict.fromkeys(name for patch in patches for name in patch.layers)
    saved = [(there[name], there[name].stored().clone()) for name in names if name in there]
    try:
        for patch in patches:
            patch.apply(model)
        if strength != 1:
            for layer, original in saved:
                _extrapolate(layer.stored(), original, strength)
        yield
    finally:
        restore(saved)


@torch.no_grad()
def _extrapolate(weight: Tensor, original: Tensor, strength: float) -> None:
    """Replace W' by W + α (W' − W), rounded once."""
    whole = torch.lerp(original.double(), weight.double(), strength)
    weight.copy_(whole if strength else original)
