"""Tables of the studies, from the JSON of their runs."""

from __future__ import annotations

import re
from pathlib import Path

from curvfast.experiments.studies.runs import STUDIES, read
from curvfast.experiments.studies.study import Lines

RESULTS = Path(__file__).parent / "results" / "studies"


def tables(folder: Path = RESULTS) -> dict[str, Lines]:
    """Return every table of every measured study, by the name of its marker.

    Args:
        folder: Folder of ``STUDY/seed-N.json``.

    Returns:
        Rows of cells by ``study-STUDY-TABLE``, without unmeasured studies.
    """
    found = {}
    for name, study in STUDIES.items():
        paths = sorted((folder / name).glob("seed-*.json"), key=lambda path: (len(path.name), path))
        if paths:
            for title, lines in study.tables([read(path)["figures"] for path in paths]).items():
                slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
                found[f"study-{name}-{slug}"] = lines
    return found
