"""The document model of a report page: blocks in sections, sections in parts; text and numbers.

Only the drawing of a :class:`Picture`, made by :mod:`.inline`, is markup: every other string is
escaped when the page is rendered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

Row = tuple[str, ...]


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Facts:
    """A list of names and values."""

    kind: ClassVar[str] = "facts"
    entries: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Table:
    """A table: rows of cells under a head; the first cell of each row is its name."""

    kind: ClassVar[str] = "table"
    caption: str
    head: Row
    rows: tuple[Row, ...]
    folded: bool = False
    """Whether it is collapsed under its caption."""


@dataclass(frozen=True)
class Drawing:
    """An inline SVG drawing."""

    svg: str
    """Markup; made by :func:`curvfast.report.inline.inline` alone."""
    width: float
    """Natural width in CSS pixels, at which text has its nominal size."""
    mark: str
    """Prefix of all ids in it; equal drawings have equal marks."""
    colours: tuple[str, ...] = ()
    """Colours the page must define, as ``rrggbb``."""


@dataclass(frozen=True)
class Picture:
    """A drawing with alternative text and a caption."""

    kind: ClassVar[str] = "picture"
    drawing: Drawing
    title: str
    caption: str


@dataclass(frozen=True)
class Gallery:
    """A grid of small pictures of one kind."""

    kind: ClassVar[str] = "gallery"
    caption: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Piece:
    """A run of words, and whether it differs from the true text."""

    text: str
    differs: bool


@dataclass(frozen=True)
class Recital:
    """A passage: prompt, true continuation, and a model's before and after an edit."""

    prompt: str
    truth: str
    before: tuple[Piece, ...]
    after: tuple[Piece, ...]


@dataclass(frozen=True)
class Recitals:
    """A block of passages, before and after side by side."""

    kind: ClassVar[str] = "recitals"
    recitals: tuple[Recital, ...]


@dataclass(frozen=True)
class Code:
    """A code block."""

    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Tiles:
    """Tiles of key figures: name, before, after."""

    kind: ClassVar[str] = "tiles"
    entries: tuple[tuple[str, str, str], ...]


Block = Text | Facts | Table | Picture | Gallery | Recitals | Code | Tiles


@dataclass(frozen=True)
class Section:
    """Blocks under one heading."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class ReportPart:
    """The part of a report page on one run, study or measurement."""

    title: str
    source: str
    """Path in the folder."""
    sections: tuple[Section, ...]
    note: str = ""
    """A warning shown at the top."""


@dataclass(frozen=True)
class Trouble:
    """A file that could not be shown, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class ReportPage:
    """A whole report page."""

    title: str
    parts: tuple[ReportPart, ...]
    troubles: tuple[Trouble, ...] = ()
    versions: tuple[tuple[str, str], ...] = field(default=())
    """Versions of the software that made the page, not the results."""


def sections(*given: tuple[str, Sequence[Block | None]]) -> tuple[Section, ...]:
    """Return titled sections without the blocks that are None, and without empty sections."""
    made = (Section(title, tuple(b for b in blocks if b is not None)) for title, blocks in given)
    return tuple(section for section in made if section.blocks)


def drawings(document: ReportPage) -> list[Drawing]:
    """Return every drawing of a page, in order."""
    found = []
    for part in document.parts:
        for section in part.sections:
            for block in section.blocks:
                if isinstance(block, Picture):
                    found.append(block.drawing)
                elif isinstance(block, Gallery):
                    found += [picture.drawing for picture in block.pictures]
    return found
