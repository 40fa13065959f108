"""The report part of a spectrum log."""

from __future__ import annotations

from pathlib import Path

from curvfast.report.page.document import Code, Picture, ReportPart, sections
from curvfast.report.page.inline import inline
from curvfast.report.plots import spectra_over_training
from curvfast.spectrum_log import read_log


def log_part(folder: Path, source: str) -> ReportPart | None:
    """Return the last run of a folder's spectrum log.

    Args:
        folder: Folder of the log.
        source: Its name on the page.

    Returns:
        The part; None if the log is empty.

    Raises:
        FormatError: If the log is damaged, or of a newer format.
        StorageError: If it cannot be read.
    """
    records = read_log(folder)
    if not records:
        return None
    picture = Picture(
        inline(lambda: spectra_over_training(records, title="")),
        "Effective rank, mass in the flattest half, and mass curves over a training.",
        "A thin line is a layer, the first ones dark; the thick line is their median.",
    )
    told = f"Run {records[-1].run}, {len(records)} measurements"
    return ReportPart(
        "Curvature over a training",
        source,
        sections((told, [picture]), ("To see it again", [Code("curvfast spectrum-log DIR")])),
    )
