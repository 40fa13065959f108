"""``curvfast spectrum-log``: tables and figures of a spectrum log."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from curvfast.display import aligned
from curvfast.errors import CurvfastError, InputError, LayerNotFound

if TYPE_CHECKING:
    from curvfast.kfac.spectrum_log import SpectrumRecord


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "spectrum-log",
        help="print and draw what CurvatureCallback logged over a training",
        description="A line for each measurement, with medians over layers: over what share of the "
        "eigenpairs the curvature spreads (effective rank), and how much of it is in the flattest "
        "half of them.",
    )
    parser.add_argument("directory", type=Path, help="the folder CurvatureCallback wrote to")
    parser.add_argument("--run", dest="of_run", help="a run, by its name (the last)")
    parser.add_argument("--layers", default="*", metavar="GLOB", help="layers of these names (*)")
    parser.add_argument("--out", type=Path, help="the picture (DIRECTORY/spectrum.png)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from curvfast.kfac.spectrum_log import read_log

    records = _chosen(read_log(options.directory, options.of_run), options)
    print(_table(records))
    try:
        from curvfast.report.plots import spectra_over_training

        title = f"run {records[0].run}, layers {options.layers}"
        figure = spectra_over_training(records, title=title)
    except ImportError as error:
        raise CurvfastError(
            "a picture needs matplotlib: pip install 'curvfast[plots]'; the table above is whole"
        ) from error
    folder = options.directory if options.directory.is_dir() else options.directory.parent
    out = options.out or folder / "spectrum.png"
    figure.savefig(out)
    if not options.quiet:
        print(f"· wrote {out}", file=sys.stderr)
    return 0


def _chosen(records: list[SpectrumRecord], options: argparse.Namespace) -> list[SpectrumRecord]:
    from curvfast.model.layers import matches_name

    if not records:
        raise InputError(
            f"{str(options.directory)!r} holds no spectrum log"
            + (f" of run {options.of_run!r}" if options.of_run else "")
            + ": pass the folder given to CurvatureCallback"
        )
    chosen = []
    for record in records:
        layers = {n: layer for n, layer in record.layers.items() if matches_name(options.layers, n)}
        if not layers:
            raise LayerNotFound(
                f"--layers {options.layers!r} matches none of the logged layers: "
                + ", ".join(record.layers)
            )
        chosen.append(replace(record, layers=layers))
    return chosen


def _table(records: list[SpectrumRecord]) -> str:
    lines = [["step", "loss", "layers", "rows", "effective rank", "flattest half"]]
    for record in records:
        layers = list(record.layers.values())
        spread = median(layer.effective_rank / (layer.d_out * layer.d_in) for layer in layers)
        lines.append(
            [
                str(record.step),
                "" if record.loss is None else f"{record.loss:.4f}",
                str(len(layers)),
                str(min(layer.rows for layer in layers)),
                f"{spread:.2%}",
                f"{100 * median(layer.flattest_half for layer in layers):.2g}%",
            ]
        )
    return aligned(lines)
