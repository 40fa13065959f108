"""What a page is made of: blocks in sections, sections in parts; all of it plain text and numbers.

Nothing here is HTML but the drawing of a :class:`Picture`, which :mod:`.inline` made: every other
string is escaped when the page is rendered.
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
    """Names and what they are."""

    kind: ClassVar[str] = "facts"
    entries: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head, the first cell of each row its name."""

    kind: ClassVar[str] = "table"
    caption: str
    head: Row
    rows: tuple[Row, ...]
    folded: bool = False
    """Whether it is shown once its caption is chosen: for what few look up."""


@dataclass(frozen=True)
class Drawing:
    """A picture as SVG that stands in the page itself."""

    svg: str
    """Markup; made by :func:`curvfast.report.page.inline.inline` alone."""
    width: float
    """Natural width in CSS pixels, at which its letters have the size they were given."""
    mark: str
    """What all names in it begin with; equal drawings have equal marks."""
    colours: tuple[str, ...] = ()
    """Colours the page must define, as ``rrggbb``."""


@dataclass(frozen=True)
class Picture:
    """A drawing, what it shows for who cannot see it, and a caption."""

    kind: ClassVar[str] = "picture"
    drawing: Drawing
    title: str
    caption: str


@dataclass(frozen=True)
class Gallery:
    """Small pictures of one kind, side by side as many as fit."""

    kind: ClassVar[str] = "gallery"
    caption: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Piece:
    """A run of words, and whether the true text has them there."""

    text: str
    differs: bool


@dataclass(frozen=True)
class Recital:
    """A passage: its prompt, how it truly goes on, and how a model went on before and after."""

    prompt: str
    truth: str
    before: tuple[Piece, ...]
    after: tuple[Piece, ...]


@dataclass(frozen=True)
class Recitals:
    """Passages, before and after side by side."""

    kind: ClassVar[str] = "recitals"
    recitals: tuple[Recital, ...]


@dataclass(frozen=True)
class Code:
    """Something to be typed."""

    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Tiles:
    """The few figures that matter most: what, before, after."""

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
    """One run, study or measurement."""

    title: str
    source: str
    """Where in the folder it was found."""
    sections: tuple[Section, ...]
    note: str = ""
    """A warning that belongs above everything else."""


@dataclass(frozen=True)
class Trouble:
    """A file that could not be shown, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class ReportPage:
    """A whole page."""

    title: str
    parts: tuple[ReportPart, ...]
    troubles: tuple[Trouble, ...] = ()
    versions: tuple[tuple[str, str], ...] = field(default=())
    """Of what made the page, not of what made the results."""


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
