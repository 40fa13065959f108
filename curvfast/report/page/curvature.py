"""The curvature of a layer in as few numbers as a picture needs, in memory and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

import numpy as np
from torch import Tensor

from curvfast.core.eigenbasis import Eigenbasis
from curvfast.core.selection import Selection
from curvfast.core.spectrum import FRACTIONS, CurvatureSpectrum, curvature_spectrum
from curvfast.core.staircase import Staircase
from curvfast.errors import FormatError
from curvfast.report.page.versions import require_version
from curvfast.storage import write_text

KIND = "curvfast-curvature"
VERSION = 1
FILE = "curvature.json"
_SAMPLES = 40
_STEPS = 48
Point = tuple[int, float]


@dataclass(frozen=True)
class Stairs:
    """The outline of a staircase: what it keeps and where it turns."""

    rows: int
    """d_out."""
    columns: int
    """d_in."""
    pairs: int
    """How many pairs it keeps."""
    mass: float
    """Share of the curvature mass it keeps."""
    corners: tuple[tuple[int, int], ...]
    """(row, width): from this row to that of the next corner, so many columns are kept. At most 48
    of all; the last has width 0 unless every row keeps some."""


@dataclass(frozen=True)
class LayerCurvature:
    """The spectrum of one layer and what is kept of it."""

    spectrum: CurvatureSpectrum
    values_g: tuple[Point, ...]
    """(number from 1, λ), at numbers that grow geometrically, the last eigenvalue included."""
    values_a: tuple[Point, ...]
    """Likewise of A."""
    stairs: Stairs | None = None


def layer_curvature(
    values_g: Tensor, values_a: Tensor, kept: Staircase | None = None
) -> LayerCurvature:
    """Return the outline of one layer.

    Args:
        values_g: λ, [d_out], descending and non-negative.
        values_a: μ, [d_in], likewise.
        kept: What is kept of it.

    Returns:
        Its outline.

    Raises:
        InputError: If a list is not a spectrum.
    """
    return LayerCurvature(
        curvature_spectrum(values_g, values_a),
        sampled(values_g),
        sampled(values_a),
        None if kept is None else outline(kept),
    )


def curvature_of(basis: Eigenbasis, kept: Selection | None = None) -> dict[str, LayerCurvature]:
    """Return the outline of each layer of a basis; no eigenvector is read.

    Args:
        basis: Eigenbases by layer name.
        kept: What is kept of them; masks have no outline.

    Returns:
        By layer name.

    Raises:
        InputError: If an eigenvalue is negative or not finite.
    """
    found = {}
    for name, (g, a) in basis.spectra().items():
        stairs = None if kept is None or name not in kept else kept[name]
        stairs = stairs if isinstance(stairs, Staircase) else None
        found[name] = layer_curvature(g.cpu(), a.cpu(), stairs)
    return found


def sampled(values: Tensor) -> tuple[Point, ...]:
    """Return at most 40 eigenvalues and their numbers from 1, which grow geometrically."""
    numbers = np.unique(np.geomspace(1, len(values), _SAMPLES).round().astype(int))
    return tuple((int(n), float(f"{float(values[n - 1]):.5g}")) for n in numbers)


def outline(kept: Staircase) -> Stairs:
    """Return where a staircase turns; of more than 48 corners, so many spread evenly."""
    widths = kept.widths.numpy()
    turns = np.flatnonzero(np.diff(widths, prepend=-1))
    if len(turns) > _STEPS:
        turns = turns[np.linspace(0, len(turns) - 1, _STEPS).round().astype(int)]
    corners = tuple((int(row), int(widths[row])) for row in turns)
    return Stairs(len(widths), kept.columns, kept.pairs, float(kept.mass), corners)


def save_curvature(
    path: str | PathLike[str],
    basis: Eigenbasis,
    kept: Selection | None = None,
    *,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write the outline of a basis and of what is kept of it as JSON, a layer a line.

    Args:
        path: The file.
        basis: Eigenbases by layer name.
        kept: What is kept of them.
        provenance: What the factors were measured on; None takes that of the basis.
    """
    layers = {name: asdict(layer) for name, layer in curvature_of(basis, kept).items()}
    facts = dict(basis.provenance if provenance is None else provenance)
    head = {"kind": KIND, "version": VERSION, "fractions": FRACTIONS, "provenance": facts}
    lines = [f"{json.dumps(name)}: {json.dumps(layer)}" for name, layer in layers.items()]
    body = ",\n".join(lines)
    write_text(path, f'{json.dumps(head)[:-1]}, "layers": {{\n{body}\n}}}}\n')


def read_curvature(
    content: Mapping[str, Any],
) -> tuple[dict[str, LayerCurvature], dict[str, Any]]:
    """Return what :func:`save_curvature` wrote.

    Args:
        content: The file's JSON.

    Returns:
        Outlines by layer name, and the provenance.

    Raises:
        FormatError: If it is of a newer version, or damaged.
    """
    require_version(content, KIND, VERSION)
    try:
        layers = {str(name): _layer(entry) for name, entry in content["layers"].items()}
        return layers, dict(content["provenance"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"damaged: {error!r}; run again what wrote it") from error


def _layer(entry: Mapping[str, Any]) -> LayerCurvature:
    spectrum = CurvatureSpectrum(**{**entry["spectrum"], "mass": tuple(entry["spectrum"]["mass"])})
    stairs = entry["stairs"]
    if stairs is not None:
        stairs = Stairs(**{**stairs, "corners": _pairs(stairs["corners"])})
    return LayerCurvature(spectrum, _pairs(entry["values_g"]), _pairs(entry["values_a"]), stairs)


def _pairs(points: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
    return tuple((first, second) for first, second in points)
