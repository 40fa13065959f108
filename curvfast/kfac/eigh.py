"""Eigendecomposition of every factor, each once; in parallel, over ranks, or streamed to disk."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from curvfast import distributed, storage
from curvfast.display import Bar
from curvfast.errors import (
    BasisMismatch,
    CurvfastError,
    DecompositionError,
    InputError,
    NumericalWarning,
    first_line,
)
from curvfast.kfac import decomposition
from curvfast.kfac.decomposition import (
    DTYPES,
    NARROW,
    RESOLUTION,
    Spectrum,
    decompose_factors,
    require_finite,
    say_next,
)
from curvfast.kfac.eigenbasis import KIND, Eigenbasis, stored_part
from curvfast.kfac.layer_basis import LayerBasis
from curvfast.kfac.layer_factors import LayerFactors
from curvfast.kfac.layer_mapping import Summed
from curvfast.kfac.leading import LeadingSearch, leading_spectrum
from curvfast.kfac.selection.rule import check_mass

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


@contextmanager
def side_stream(device: torch.device | None) -> Iterator[None]:
    """Run the block on a new stream, ordered after the work queued now; synchronised at its end.

    Args:
        device: Device of the block's tensors; on any other than a CUDA device nothing changes.

    Yields:
        Nothing.
    """
    if device is None or device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


# Factors in a batch: some 700 MB of work space at the widest.
_BATCH = 64


def decompose(
    factors: Summed[LayerFactors],
    *,
    dtype: torch.dtype,
    progress: bool,
    workers: int,
    directory: str | PathLike[str] | None,
    mass: float | None,
    start: Eigenbasis | None,
    group: distributed.Group,
    device: torch.device | None,
) -> Eigenbasis:
    """Eigendecompose ``factors``; see :meth:`Factors.eigh`."""
    _check(factors, dtype, workers, mass, start)
    layers = _pairs(factors)
    keys = dict.fromkeys(key for pair in layers.values() for key in pair)
    search = LeadingSearch({key: len(_sum(factors, key)) for key in keys}, layers, mass)
    negative: dict[str, float] = {}

    def solve(keys: tuple[str, ...]) -> list[Spectrum | None]:
        titles, matrices = [_title(k) for k in keys], [_mean(factors, k) for k in keys]
        home = matrices[0].device
        if device is not None:
            matrices = [matrix.to(device) for matrix in matrices]
        count = search.count(keys[0])
        with side_stream(matrices[0].device if workers > 1 else None):
            if count is None:
                solved = decompose_factors(matrices, dtype=dtype, titles=titles)
                return [spectrum.to(home) for spectrum in solved]
            require_finite(matrices[0], titles[0])
            earlier = _earlier(start, keys[0])
            try:
                leading = leading_spectrum(matrices[0], count, share=mass or 0.0, start=earlier)
            except RuntimeError as error:
                say_next(titles[0], f"leading eigenpairs: {first_line(error)}", error)
                leading = None
            return [leading and leading.to(home)]

    first = distributed.rank_and_size(group)[0] == 0
    with ExitStack() as stack:
        bar = stack.enter_context(Bar("eigendecompositions", len(keys), "factor", progress))
        folder = directory if first else None
        writer = folder and stack.enter_context(storage.FolderWriter(folder, KIND))
        while wanted := search.wanted():
            own = owned_factors(wanted, search.widths, group)
            results = _in_turn(solve, _batches(factors, own, device), workers)
            for key, spectrum in broadcast_results(results, wanted, search.widths, group):
                if spectrum is not None and _whole(spectrum):
                    bar.advance(1)
                    if spectrum.negative > RESOLUTION[dtype]:
                        negative[_title(key)] = spectrum.negative
                    if writer:
                        writer.add(stored_part(key, spectrum.values, spectrum.vectors))
                        spectrum = replace(spectrum, vectors=spectrum.vectors[:0].clone())
                search.note(key, spectrum)
        for key, spectrum in search.found.items():
            if not _whole(spectrum):
                bar.advance(1)
                if writer:
                    writer.add(stored_part(key, spectrum.values, spectrum.vectors))
        if writer:
            names = {name: {"a": a, "g": g} for name, (a, g) in layers.items()}
            writer.finish({"layers": names, "provenance": dict(factors.provenance)})
    _warn_negative(negative, min((layer.rows_g for layer in factors.values()), default=0))
    distributed.gather("written", group)
    if directory is not None:
        return Eigenbasis.from_pretrained(directory, lazy=True)
    found = search.found
    return Eigenbasis(
        {
            name: LayerBasis(found[a].values, found[a].vectors, found[g].values, found[g].vectors)
            for name, (a, g) in layers.items()
        },
        factors.provenance,
    )


def _check(
    factors: Summed[LayerFactors],
    dtype: torch.dtype,
    workers: int,
    mass: float | None,
    start: Eigenbasis | None,
) -> None:
    if dtype not in DTYPES:
        raise InputError(f"eigh works in float64 (default) or float32, not {dtype}")
    if workers < 1:
        raise InputError(f"workers={workers}: pass how many factors are decomposed at a time")
    if mass is not None:
        check_mass(mass)
        if dtype != torch.float64:
            raise InputError("mass= is certified in float64; leave dtype= out, or mass=")
    if start is None:
        return
    if mass is None:
        raise InputError("start= shortens the search for leading eigenpairs only: pass mass= too")
    for name in factors.keys() & start.keys():
        here, there = factors[name].shape, start[name].shape
        if there != here:
            raise BasisMismatch(
                f"layer {name!r} is {here} in these factors and {there} in start=: a basis of "
                "another model"
            )


def _earlier(start: Eigenbasis | None, key: str) -> Tensor | None:
    side, name = key.split(".", 1)
    if start is None or name not in start:
        return None
    return start[name].vectors_a if side == "a" else start[name].vectors_g


def _whole(spectrum: Spectrum) -> bool:
    return spectrum.vectors.shape[1] == len(spectrum.values)


def _pairs(factors: Summed[LayerFactors]) -> dict[str, tuple[str, str]]:
    """Return the keys of each layer's (A, G); layers that share an A have its one key."""
    owners: dict[int, str] = {}
    return {
        name: (owners.setdefault(id(layer.a_sum), f"a.{name}"), f"g.{name}")
        for name, layer in factors.items()
    }


def _title(key: str) -> str:
    side, name = key.split(".", 1)
    return f"{side.upper()} of layer {name!r}"


def _mean(factors: Summed[LayerFactors], key: str) -> Tensor:
    side, name = key.split(".", 1)
    return factors[name].A if side == "a" else factors[name].G


def _sum(factors: Summed[LayerFactors], key: str) -> Tensor:
    side, name = key.split(".", 1)
    return factors[name].a_sum if side == "a" else factors[name].g_sum


def _batches(
    factors: Summed[LayerFactors], keys: Sequence[str], device: torch.device | None
) -> list[tuple[str, ...]]:
    """Return the keys that one call solves: a factor, or on a GPU many small ones of one width."""
    groups: dict[Any, list[str]] = {}
    for key in keys:
        where, d = device or _sum(factors, key).device, len(_sum(factors, key))
        alike = (where, d) if decomposition.takes_batches(where) and d < NARROW else key
        groups.setdefault(alike, []).append(key)
    return [
        tuple(group[start : start + _BATCH])
        for group in groups.values()
        for start in range(0, len(group), _BATCH)
    ]


def _in_turn(
    solve: Callable[[tuple[str, ...]], list[Spectrum | None]],
    batches: Sequence[tuple[str, ...]],
    workers: int,
) -> Iterator[tuple[str, Spectrum | None]]:
    if workers == 1:
        for batch in batches:
            yield from zip(batch, solve(batch), strict=True)
        return
    with ThreadPoolExecutor(workers) as pool:
        for batch, found in zip(batches, pool.map(solve, batches), strict=True):
            yield from zip(batch, found, strict=True)


def _warn_negative(negative: dict[str, float], rows: int) -> None:
    if not negative:
        return
    worst = max(negative, key=negative.__getitem__)
    size = negative[worst]
    verdict = (
        "that is the rounding of float32 sums"
        if size < 1e-5
        else f"far beyond rounding: is this a second moment, and are {rows} rows of it enough?"
    )
    warnings.warn(
        f"{len(negative)} factor(s) have negative eigenvalues, set to 0; the most negative is "
        f"-{size:.1e} of the largest, in {worst}: {verdict}",
        NumericalWarning,
        stacklevel=4,
    )
