"""``curvfast report``: one HTML page of all results in a folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curvfast.errors import CurvfastError, StorageError

if TYPE_CHECKING:
    from curvfast.report.document import ReportPart

_NAME = "report.html"


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "report",
        help="one page of HTML of what is in a folder: figures, spectra, passages, provenance",
        description="Reads what demo, lab and study wrote with --out, and factors, bases, "
        "selections, patches and edit reports as the library saves them. The page is one file that "
        "loads nothing else.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="folder of results")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"default DIR/{_NAME}")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    try:
        from curvfast.report.folder import read_folder
        from curvfast.report.render import render

        document = read_folder(options.directory, _study)
        page = render(document)
    except ImportError as error:
        raise CurvfastError(
            f"a report needs jinja2 and matplotlib: pip install 'curvfast[report]' ({error})"
        ) from error
    out = options.out or options.directory / _NAME
    from curvfast.storage import write_text

    try:
        write_text(out, page)
    except OSError as error:
        raise StorageError(f"could not write {str(out)!r}: {error}; pass another --out") from error
    for trouble in document.troubles:
        print(f"curvfast: not shown: {trouble.path}: {trouble.reason}", file=sys.stderr)
    if not options.quiet:
        print(f"· wrote {out}, {len(page.encode()) / 1000:,.0f} kB", file=sys.stderr)
    return 0


def _study(folder: Path, source: str, trouble: Callable[[str, str], None]) -> ReportPart | None:
    # Imported only if there is a study to show: the catalogue imports every experiment.
    from curvfast.experiments.studies.report_part import study_part

    return study_part(folder, source, trouble)
