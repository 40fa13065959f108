"""Fingerprints of weights, by which a patch recognises its original and its edited weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

from torch import Tensor

from curvfast.errors import PatchMismatch
from curvfast.export.bit_difference import bits_of
from curvfast.storage import raw_bytes


@dataclass(frozen=True)
class Fingerprint:
    """Dtype, shape and hash of a stored weight."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str
    """SHA-256 of its bytes, in row-major order."""


def fingerprint_of(tensor: Tensor) -> Fingerprint:
    """Return the fingerprint of a weight as it is stored."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Fingerprint(dtype, tuple(tensor.shape), sha256(bits_of(tensor).data).hexdigest())


def digest_of(*tensors: Tensor) -> str:
    """Return the SHA-256 of tensors: their dtypes, shapes and bytes, in row-major order."""
    digest = sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def require(
    found: Mapping[str, Fingerprint],
    before: Mapping[str, Fingerprint],
    after: Mapping[str, Fingerprint],
    source: str | None,
    *,
    revert: bool,
) -> None:
    """Raise unless each layer's weight is the one that a patch was made from, or that it produced.

    Args:
        found: Fingerprints of the weights, by layer name.
        before: Fingerprint of the weights that the patch was made from.
        after: Fingerprint of the weights that it produces.
        source: Name of the model that it was made from, if known.
        revert: Whether to compare with ``after``.

    Raises:
        PatchMismatch: If one is not; the message says whether it is of the other side or foreign.
    """
    wanted, other = (after, before) if revert else (before, after)
    for name, have in found.items():
        if have not in (wanted[name], other[name]):
            raise _foreign(name, have, wanted[name], source)
    changed = [name for name in found if wanted[name] != other[name]]
    wrong = [name for name in changed if found[name] == other[name]]
    if wrong and len(wrong) < len(changed):
        raise PatchMismatch(
            f"some of the layers are patched and some are not; {wrong[0]!r} and {len(wrong) - 1} "
            f"more of {len(changed)} are not as they must be: load the model anew"
        )
    if wrong:
        raise PatchMismatch(
            "the patch is not applied: these weights are those it was made from"
            if revert
            else "the patch is applied already: revert it first, or leave it"
        )


def _foreign(
    name: str, have: Fingerprint, wanted: Fingerprint, source: str | None
) -> PatchMismatch:
    if (have.dtype, have.shape) != (wanted.dtype, wanted.shape):
        return PatchMismatch(
            f"the patch is for layer {name!r} in {wanted.dtype} {list(wanted.shape)}, and here it "
            f"is {have.dtype} {list(have.shape)}: load the model the patch was made of with "
            f"dtype=torch.{wanted.dtype}, or make a patch of this one"
        )
    return PatchMismatch(
        f"layer {name!r} holds other weights than the patch was made of (sha256 "
        f"{have.sha256[:12]}…, not {wanted.sha256[:12]}…): another model or revision, or edited or "
        f"trained since. Load {repr(source) if source else 'the model it was made of'}, or make a "
        "patch of this one by curvfast.make_patch"
    )
