"""The eigendecomposition of every factor: each once, in turn or at a time, kept or stored."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from os import PathLike

import torch
from torch import Tensor

from curvfast import storage
from curvfast.core.decomposition import DTYPES, Spectrum, decompose_factor
from curvfast.core.eigenbasis import KIND, Eigenbasis, LayerBasis, stored_part
from curvfast.core.factors import Factors
from curvfast.errors import InputError, NumericalWarning
from curvfast.progress import Bar


def decompose(
    factors: Factors,
    *,
    dtype: torch.dtype,
    progress: bool,
    workers: int,
    directory: str | PathLike[str] | None,
) -> Eigenbasis:
    """Eigendecompose ``factors``; see :meth:`Factors.eigh`."""
    if dtype not in DTYPES:
        raise InputError(f"eigh works in float64 (default) or float32, not {dtype}")
    if workers < 1:
        raise InputError(f"workers={workers}: pass how many factors are decomposed at a time")
    jobs, layers = _jobs(factors)
    found: dict[str, Spectrum] = {}
    negative: dict[str, float] = {}

    def solve(key: str) -> tuple[str, Spectrum]:
        title, matrix = jobs[key]
        return key, decompose_factor(matrix(), dtype=dtype, title=title)

    # The largest first: the last to finish are then the smallest.
    order = sorted(jobs, key=lambda key: -_width(factors, key))
    keep = found.__setitem__
    with ExitStack() as stack:
        bar = stack.enter_context(Bar("eigendecompositions", len(jobs), "factor", progress))
        if directory is not None:
            writer = stack.enter_context(storage.FolderWriter(directory, KIND))

            def keep(key: str, spectrum: Spectrum) -> None:
                writer.add(stored_part(key, spectrum.values, spectrum.vectors))

        for key, spectrum in _in_turn(solve, order, workers):
            bar.advance(1)
            negative |= {jobs[key][0]: spectrum.negative} if spectrum.negative else {}
            keep(key, spectrum)
        if directory is not None:
            writer.finish({"layers": {n: {"a": a, "g": g} for n, (a, g) in layers.items()}})
    _warn_negative(negative, factors.rows)
    if directory is not None:
        return Eigenbasis.from_pretrained(directory, lazy=True)
    return Eigenbasis(
        {
            name: LayerBasis(found[a].values, found[a].vectors, found[g].values, found[g].vectors)
            for name, (a, g) in layers.items()
        }
    )


_Jobs = dict[str, tuple[str, Callable[[], Tensor]]]


def _jobs(factors: Factors) -> tuple[_Jobs, dict[str, tuple[str, str]]]:
    """Return each factor to decompose, a shared one once, and which two each layer needs."""
    jobs: _Jobs = {}
    owners: dict[int, str] = {}
    layers = {}
    for name, layer in factors.items():
        a = owners.setdefault(id(layer.a_sum), f"a.{name}")
        if a not in jobs:
            jobs[a] = (f"A of layer {name!r}", lambda layer=layer: layer.A)  # type: ignore[misc]
        jobs[f"g.{name}"] = (f"G of layer {name!r}", lambda layer=layer: layer.G)  # type: ignore[misc]
        layers[name] = (a, f"g.{name}")
    return jobs, layers


def _width(factors: Factors, key: str) -> int:
    side, name = key.split(".", 1)
    return len(factors[name].a_sum if side == "a" else factors[name].g_sum)


def _in_turn(
    solve: Callable[[str], tuple[str, Spectrum]], keys: Sequence[str], workers: int
) -> Iterator[tuple[str, Spectrum]]:
    if workers == 1:
        yield from map(solve, keys)
        return
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(solve, keys)


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
