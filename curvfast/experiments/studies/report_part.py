"""The report part of a study's folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from curvfast.errors import CurvfastError, StorageError
from curvfast.experiments.studies.names import NAMES
from curvfast.experiments.studies.runs import STUDIES, read
from curvfast.report.document import Block, Facts, Picture, ReportPart, Table, sections
from curvfast.report.inline import inline
from curvfast.report.results import QUICK, again


def study_part(folder: Path, source: str, trouble: Callable[[str, str], None]) -> ReportPart | None:
    """Return tables and picture of a study over the seeds that a folder holds.

    Args:
        folder: Folder with a ``seed-N.json`` for each seed.
        source: Its name on the page.
        trouble: Called with the name of each file that cannot be read, and why.

    Returns:
        The part; None if no seed can be read.

    Raises:
        StorageError: If the study is unknown to this library, or seeds are of more than one study.
    """
    runs = []
    for path in sorted(folder.glob("seed-*.json"), key=_number):
        try:
            runs.append(read(path))
        except CurvfastError as error:
            where = path.name if source == "." else f"{source}/{path.name}"
            trouble(where, str(error).replace(f"{folder}/", ""))
    if not runs:
        return None
    names = sorted({str(run["study"]) for run in runs})
    name = names[0]
    if len(names) > 1 or name not in STUDIES:
        raise StorageError(
            f"seeds of {' and '.join(names)}: not one study that this curvfast "
            "knows; upgrade it, or keep each study in a folder of its own"
        )
    study, (title, origin) = STUDIES[name], NAMES[name]
    figures = [run["figures"] for run in runs]
    heading = f"{title[:1].upper()}{title[1:]}"
    seeds = [run["seed"] for run in runs]
    # Any: the type of a study's picture only declares savefig.
    draw: Callable[[], Any] = partial(study.picture, figures)
    shown: list[Block] = [Picture(inline(draw), heading, f"{heading}; {_seeds(seeds)}.")]
    for caption, (head, *rows) in study.tables(figures).items():
        made = tuple(tuple(row) for row in rows)
        shown.append(Table(caption[:1].upper() + caption[1:], tuple(head), made))
    quick = any(run["quick"] for run in runs)
    command = f"curvfast study {name} --seeds {' '.join(map(str, seeds))}{' --quick' * quick}"
    return ReportPart(
        f"{name}: {title}",
        source,
        sections(
            ("Figures", shown),
            ("Where it comes from", [_facts(runs, origin), _by_seed(runs)]),
            ("To make it again", [again(command)]),
        ),
        QUICK if quick else "",
    )


def _facts(runs: list[dict[str, Any]], origin: str) -> Facts:
    versions: dict[str, set[str]] = {}
    for run in runs:
        for library, version in run.get("versions", {}).items():
            versions.setdefault(library, set()).add(str(version))
    repeats = f"{origin} of arXiv 2510.24256, in kind" if origin else "nothing: it goes beyond it"
    entries = [
        ("repeats of the paper", repeats),
        ("seeds", ", ".join(str(run["seed"]) for run in runs)),
    ]
    entries += [(library, ", ".join(sorted(found))) for library, found in versions.items()]
    return Facts(tuple(entries))


def _by_seed(runs: list[dict[str, Any]]) -> Table:
    rows = tuple(
        (str(run["seed"]), f"{run.get('seconds', 0):,.0f}", f"{run.get('cpu_seconds', 0):,.0f}")
        for run in runs
    )
    return Table("What it took", ("seed", "seconds", "CPU seconds"), rows, folded=True)


def _seeds(seeds: list[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def _number(path: Path) -> tuple[int, str]:
    digits = path.stem.removeprefix("seed-")
    return (int(digits) if digits.isdigit() else 0, path.name)
