"""The tables of the studies, from the JSON of their runs."""

from __future__ import annotations

import re
from pathlib import Path

from curvfast.studies.catalogue import STUDIES
from curvfast.studies.runs import read
from curvfast.studies.study import Lines

RESULTS = Path(__file__).parent / "results" / "studies"


def tables(folder: Path = RESULTS) -> dict[str, Lines]:
    """Return every table of every study that was measured, by a name fit for a marker.

    Args:
        folder: Holds ``STUDY/seed-N.json``.

    Returns:
        Rows of cells by ``study-STUDY-TABLE``; studies that were never measured have none.
    """
    found = {}
    for name, study in STUDIES.items():
        paths = sorted((folder / name).glob("seed-*.json"), key=lambda path: (len(path.name), path))
        if paths:
            for title, lines in study.tables([read(path)["figures"] for path in paths]).items():
                slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
                found[f"study-{name}-{slug}"] = lines
    return found
