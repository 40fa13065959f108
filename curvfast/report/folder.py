"""read_folder(): builds a report page from the results and spectrum logs in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from curvfast.editing.report import EditReport
from curvfast.errors import CurvfastError, InputError
from curvfast.kfac.spectrum_log import FILE as LOG
from curvfast.kfac.spectrum_log import read_log
from curvfast.report.blocks import recited, spectra, staircases
from curvfast.report.curvature import KIND as CURVATURE
from curvfast.report.curvature import read_curvature
from curvfast.report.document import (
    Code,
    Picture,
    ReportPage,
    ReportPart,
    Section,
    Trouble,
    sections,
)
from curvfast.report.inline import inline
from curvfast.report.plots import spectra_over_training
from curvfast.report.provenance import MEASURED, collected, uncovered
from curvfast.report.recitals import KIND as PASSAGES
from curvfast.report.recitals import read_passages
from curvfast.report.results import experiment
from curvfast.report.saved import KINDS, Saved


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


StudyPart = Callable[[Path, str, "Callable[[str, str], None]"], ReportPart | None]
"""(folder, name on the page, callback for unreadable files) -> a study's report part."""
_DEPTH = 3
_CHECKPOINT = "checkpoint"
_WRITERS = """\
  curvfast demo --out DIR             the paper's experiment in small
  curvfast lab lm --out DIR           tasks before and after an edit
  curvfast study figure3 --out DIR    a figure of the paper, over seeds
  factors.save_pretrained(...), basis.save_pretrained(...), selection.save_pretrained(...),
  patch.save(...), and the JSON of an edit's report.to_dict()"""
# Exceptions that damaged or foreign JSON causes in code that expects another structure.
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError)


@dataclass
class _Reading:
    """Parts and troubles found so far."""

    root: Path
    study: StudyPart
    parts: list[ReportPart] = field(default_factory=list)
    troubles: list[Trouble] = field(default_factory=list)

    def name(self, path: Path) -> str:
        return "." if path == self.root else path.relative_to(self.root).as_posix()

    def trouble(self, path: str, reason: str) -> None:
        self.troubles.append(Trouble(path, reason))

    def attempt(self, path: Path, read: Callable[[], Any]) -> Any:
        """Return a reader's result; or None, after recording why it failed."""
        try:
            return read()
        except CurvfastError as error:
            # Messages hold absolute paths, which differ between machines.
            told = str(error).replace(str(self.root) + "/", "").replace(str(self.root), ".")
            self.trouble(self.name(path), told)
        except _DAMAGE as error:
            kind = type(error).__name__
            self.trouble(self.name(path), f"not as curvfast writes it ({kind}: {error})")
        return None


def read_folder(directory: Path, study: StudyPart) -> ReportPage:
    """Return a report page of everything in a folder that this library wrote.

    Args:
        directory: The folder; subfolders are searched, three levels deep.
        study: Makes the part of a study's folder.

    Returns:
        The page, parts in the order of their names. Unreadable files are among its troubles.

    Raises:
        InputError: If the folder is missing, or holds nothing to show.
    """
    root = directory.resolve()
    if not root.is_dir():
        raise InputError(f"{str(directory)!r} is no folder: pass the one given to --out")
    reading = _Reading(root, study)
    for folder in _folders(root, _DEPTH):
        _read(reading, folder)
    if not reading.parts:
        told = "".join(f"\n  {t.path}: {t.reason}" for t in reading.troubles)
        raise InputError(
            f"{str(directory)!r} holds nothing a report could show. It is made of what these write:"
            f"\n{_WRITERS}" + (f"\nWhat is there:{told}" if told else "")
        )
    return ReportPage(root.name or "results", tuple(reading.parts), tuple(reading.troubles))


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    """Yield a folder and its subfolders, by name, without hidden ones and links."""
    yield folder
    if depth:
        for inner in sorted(folder.iterdir()):
            if inner.is_dir() and not inner.is_symlink() and not inner.name.startswith("."):
                yield from _folders(inner, depth - 1)


def _read(reading: _Reading, folder: Path) -> None:
    """Add the parts of one folder."""
    kind = _kind(folder)
    if kind is not None and kind != _CHECKPOINT and folder != reading.root:
        # Read together with the files beside it, from the parent folder.
        return
    names = "curvfast.json" if kind == _CHECKPOINT else "*.json"
    found = [] if kind in KINDS else sorted(folder.glob(names))
    contents = {path: _json(reading, path) for path in found}
    saved = Saved()
    for each, path in _saved_folders(reading, folder):
        reading.attempt(path, partial(saved.add, each, path))
    _add_results(reading, folder, contents, saved)
    if any(path.name.startswith("seed-") for path in contents):
        part = reading.attempt(
            folder, lambda: reading.study(folder, reading.name(folder), reading.trouble)
        )
        reading.parts += [part] if part else []
    if (folder / LOG).is_file():
        part = reading.attempt(folder / LOG, lambda: log_part(folder, reading.name(folder / LOG)))
        reading.parts += [part] if part else []
    if saved.found:
        part = reading.attempt(folder, lambda: saved.part(reading.name(folder)))
        reading.parts += [part] if part else []


def _add_results(
    reading: _Reading, folder: Path, contents: Mapping[Path, Any], saved: Saved
) -> None:
    """Add experiments, with the files saved beside them, and reports of edits."""
    beside, shown = _beside(reading, contents), False
    for path, content in contents.items():
        keys = content.keys() if isinstance(content, dict) else set()
        if keys >= {"layers", "total_pairs", "strength", "provenance"}:
            report = reading.attempt(path, partial(EditReport.from_dict, content))
            if report is not None:
                saved.add_edit(path.name, report)
        elif keys >= {"base", "kfac", "sweep", "mass"}:
            own = () if shown else beside
            part = reading.attempt(path, partial(experiment, content, reading.name(path), own))
            if part is not None:
                reading.parts.append(part)
                shown = True
        elif content is not None and not _read_elsewhere(path, content):
            reading.trouble(reading.name(path), "nothing that a report knows: left out")
    if beside and not shown:
        reading.parts.append(ReportPart("Curvature and passages", reading.name(folder), beside))


def _read_elsewhere(path: Path, content: Any) -> bool:
    kind = content.get("kind") if isinstance(content, dict) else None
    return kind in (PASSAGES, CURVATURE) or path.name.startswith("seed-")


def _beside(reading: _Reading, contents: Mapping[Path, Any]) -> tuple[Section, ...]:
    """Return sections of the curvature and the passages saved beside results."""
    found: list[Section] = []
    for kind, made_of in ((PASSAGES, _passages), (CURVATURE, _curvature)):
        for path, content in contents.items():
            if isinstance(content, dict) and content.get("kind") == kind:
                found += reading.attempt(path, partial(made_of, content)) or ()
    return tuple(found)


def _passages(content: Mapping[str, Any]) -> tuple[Section, ...]:
    return sections(("Passages, before and after", recited(*read_passages(content))))


def _curvature(content: Mapping[str, Any]) -> tuple[Section, ...]:
    layers, provenance = read_curvature(content)
    kept = {name: layer.stairs for name, layer in layers.items() if layer.stairs is not None}
    return sections(
        ("Spectra", spectra(layers)),
        ("Staircases", staircases(kept)),
        (MEASURED, [collected(provenance), uncovered(provenance)]),
    )


def _saved_folders(reading: _Reading, folder: Path) -> list[tuple[str, Path]]:
    """Return kind and path of saved objects in this folder, in reading order."""
    inner = [folder] if folder == reading.root else []
    inner += [path for path in sorted(folder.iterdir()) if path.is_dir()]
    kinds = {path: kind for path in inner if (kind := _kind(path)) not in (None, _CHECKPOINT)}
    for path, kind in kinds.items():
        if kind not in KINDS:
            reading.trouble(reading.name(path), f"holds {kind}, which a report does not show")
    found = [(kind, path) for path, kind in kinds.items() if kind in KINDS]
    return sorted(found, key=lambda each: KINDS.index(each[0]))


def _kind(folder: Path) -> str | None:
    """Return the kind that a folder's config.json declares, if it is ours or a model's."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config.get("kind")
    except (OSError, ValueError, AttributeError):
        return None
    if isinstance(kind, str) and kind.startswith("curvfast-"):
        return kind
    return _CHECKPOINT if config.keys() & {"model_type", "architectures"} else None


def _json(reading: _Reading, path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reading.trouble(reading.name(path), f"cannot be read as JSON: {error}")
        return None
