"""The spectrum log: the curvature spectrum of each layer over the course of a training.

One line of JSON a measurement, only ever appended: ``{"kind", "version", "run", "step", "steps",
"processes", "loss", "fractions", "layers": {name: {"rows", "d_out", "d_in", "trace_g", …}}}``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from curvfast.errors import FormatError
from curvfast.kfac.factors import Factors
from curvfast.kfac.spectrum import (
    FRACTIONS,
    CurvatureSpectrum,
    curvature_spectrum,
    layer_eigenvalues,
)
from curvfast.storage import append_line, finished_lines, record_of

FILE = "spectrum.jsonl"
KIND = "curvfast-spectrum"
VERSION = 1


@dataclass(frozen=True)
class LayerRecord(CurvatureSpectrum):
    """The curvature spectrum of one layer, and the number of rows it was measured on."""

    rows: int
    """Fewer than d_out or d_in give a rank-deficient spectrum."""


@dataclass(frozen=True)
class SpectrumRecord:
    """One measurement of every chosen layer: a line of the log."""

    run: str
    """Which training it belongs to; a resumed one goes on under its name."""
    step: int
    """Optimizer steps taken when the measurement began."""
    steps: int
    """Optimizer steps that the measurement lasted."""
    loss: float | None
    """Mean loss per label during the measurement, where the model returns its loss."""
    fractions: tuple[float, ...]
    """Shares of all pairs at which each layer's ``mass`` is given."""
    layers: Mapping[str, LayerRecord]
    """By layer name."""
    processes: int = 1
    """How many processes trained; the rows are those of the first."""

    def to_json(self) -> str:
        """Return the record as one line, without its end."""
        head = {"kind": KIND, "version": VERSION}
        return json.dumps({**head, **asdict(self)}, ensure_ascii=False)


def measure(
    factors: Factors,
    *,
    run: str,
    step: int,
    steps: int = 1,
    loss: float | None = None,
    fractions: Sequence[float] = FRACTIONS,
    processes: int = 1,
) -> SpectrumRecord:
    """Describe the spectra of ``factors``, from eigenvalues alone.

    Args:
        factors: The measured factors.
        run: Name of the training; a resumed one continues under its name.
        step: Optimizer steps taken when the measurement began.
        steps: Optimizer steps that it lasted.
        loss: Mean loss per label during it; left out if it is not finite.
        fractions: Shares of all pairs at which the mass curves are evaluated.
        processes: Number of processes that trained.

    Returns:
        The record.

    Raises:
        NonFiniteError: If a factor holds NaN or infinity.
        DecompositionError: If no solver could decompose a factor.
        InputError: If a fraction is outside [0, 1].
    """
    known: dict[int, Tensor] = {}
    layers = {}
    for name, layer in factors.items():
        values_g, values_a = layer_eigenvalues(name, layer, known)
        found = curvature_spectrum(values_g, values_a, fractions)
        layers[name] = LayerRecord(**vars(found), rows=layer.rows_g)
    loss = loss if loss is not None and math.isfinite(loss) else None
    return SpectrumRecord(run, step, steps, loss, tuple(fractions), layers, processes)


def append(directory: str | PathLike[str], record: SpectrumRecord) -> None:
    """Add a record to the log of a folder, on the disk when this returns.

    The end of a line that a killed run left unfinished is removed first.

    Args:
        directory: Made if missing.
        record: The measurement.

    Raises:
        StorageError: If it cannot be written; what was there is untouched.
    """
    append_line(Path(directory) / FILE, record.to_json())


def read_log(directory: str | PathLike[str], run: str | None = None) -> list[SpectrumRecord]:
    """Read a spectrum log.

    Where a run was resumed from before its last measurement, its repeated measurements replace the
    earlier ones from that step on. An unfinished line, left by a killed run, is skipped.

    Args:
        directory: The folder, or its file.
        run: Of which run; None takes the last.

    Returns:
        Its records, by step; none if there is no log.

    Raises:
        FormatError: If a line is something else, or of a newer format.
        StorageError: If the file cannot be read.
    """
    path = Path(directory)
    path = path / FILE if path.is_dir() else path
    kept: list[SpectrumRecord] = []
    records = list(_records(path, finished_lines(path)))
    run = records[-1].run if records and run is None else run
    for record in records:
        if record.run == run:
            kept = [earlier for earlier in kept if earlier.step < record.step]
            kept.append(record)
    return kept


def _records(path: Path, lines: Sequence[bytes]) -> Iterator[SpectrumRecord]:
    names = {field.name for field in fields(SpectrumRecord)}
    for number, line in enumerate(lines, 1):
        where = f"line {number} of {str(path)!r}"
        entry = record_of(line, where, KIND, VERSION)
        yield _record(where, {key: entry[key] for key in names & entry.keys()})


def _record(where: str, entry: dict[str, Any]) -> SpectrumRecord:
    try:
        layers = {
            name: LayerRecord(**{**layer, "mass": tuple(layer["mass"])})
            for name, layer in entry.pop("layers").items()
        }
        return SpectrumRecord(**{**entry, "fractions": tuple(entry["fractions"]), "layers": layers})
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{where} is damaged: {error}") from error
