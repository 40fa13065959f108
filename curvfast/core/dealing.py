"""Eigendecompositions distributed over ranks by d³, and the broadcast of their results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from curvfast import distributed
from curvfast.core.decomposition import Spectrum
from curvfast.errors import CurvfastError, DecompositionError

Results = Iterable[tuple[str, Spectrum | None]]


def owned_factors(
    keys: Sequence[str], widths: Mapping[str, int], group: distributed.Group
) -> list[str]:
    """Return the factors this rank decomposes, in the order given."""
    rank, size = distributed.rank_and_size(group)
    owners = _owners(keys, widths, size)
    return [key for key in keys if owners[key] == rank]


def broadcast_results(
    found: Results, keys: Sequence[str], widths: Mapping[str, int], group: distributed.Group
) -> Iterator[tuple[str, Spectrum | None]]:
    """Broadcast every rank's results to every rank; called by all.

    Args:
        found: This rank's results, as they are computed.
        keys: The factors that all ranks decompose together.
        widths: d of each factor.
        group: The ranks.

    Yields:
        Factor and eigenpairs; None where the search found none yet.

    Raises:
        DecompositionError: If a rank could not decompose one of its factors.
        DistributedError: If another rank is gone.
    """
    if group is None:
        yield from found
        return
    own: dict[str, Spectrum | None] = {}
    error: CurvfastError | None = None
    try:
        own = dict(found)
    except CurvfastError as caught:
        error = caught
    # Failures are exchanged first, so that no rank waits for a result that never comes.
    everywhere = distributed.gather((_facts(own), error and str(error)), group)
    if error is not None:
        raise error
    for rank, (_, message) in enumerate(everywhere):
        if message:
            raise DecompositionError(f"rank {rank}: {message}")
    owners = _owners(keys, widths, len(everywhere))
    for key in keys:
        owner = owners[key]
        fact = everywhere[owner][0][key]
        if fact is None:
            yield key, None
            continue
        rank, negative, device = fact
        mine = own.get(key)
        if mine is None:
            place = torch.device(device)
            values = torch.empty(widths[key], dtype=torch.float64, device=place)
            vectors = torch.empty(widths[key], rank, dtype=torch.float32, device=place)
            mine = Spectrum(values, vectors, negative)
        for tensor in (mine.values, mine.vectors):
            distributed.broadcast_(tensor, owner, group)
        yield key, mine


def _facts(own: Mapping[str, Spectrum | None]) -> dict[str, tuple[int, float, str] | None]:
    """Return the metadata exchanged before results are sent: (k, negative, device kind)."""
    return {
        key: None if s is None else (s.vectors.shape[1], s.negative, s.vectors.device.type)
        for key, s in own.items()
    }


def _owners(keys: Sequence[str], widths: Mapping[str, int], ranks: int) -> dict[str, int]:
    return distributed.deal({key: float(widths[key]) ** 3 for key in keys}, ranks)
