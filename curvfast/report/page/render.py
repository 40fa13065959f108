"""Fills the templates: a document in, a whole page of HTML out, that loads nothing."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from curvfast._version import __version__
from curvfast.report.page.document import Drawing, ReportPage, drawings
from curvfast.report.page.inline import dark

if TYPE_CHECKING:
    from jinja2 import Environment

_NUMBER = re.compile(r"[-−+]?[\d.,]+(e[-+]?\d+)?( ?%)?( ± [\d.,]+)?|–|nan|inf")
# Share of a drawing's natural width below which its letters are too small to be read.
_SMALLEST = 0.66


def render(document: ReportPage) -> str:
    """Return a document as one file of HTML: styles and drawings inside, no script, no request.

    All text is escaped; drawings alone are put in as they are.

    Args:
        document: The document.

    Returns:
        HTML; equal documents give equal text.
    """
    used = sorted({colour for drawing in drawings(document) for colour in drawing.colours})
    return (
        _environment()
        .get_template("page.html")
        .render(
            document=document,
            version=__version__,
            light={colour: colour for colour in used},
            dark={colour: dark(colour) for colour in used},
        )
    )


def anchor(*titles: str) -> str:
    """Return a name for a place in the page, of letters, digits and hyphens."""
    words = re.findall(r"[a-z0-9]+", " ".join(titles).lower())
    return "-".join(words) or "part"


def numeric(rows: Sequence[Sequence[str]], column: int) -> bool:
    """Return whether a column holds numbers only, which are then aligned right."""
    return all(_NUMBER.fullmatch(row[column].strip() or "0") for row in rows)


def narrowest(drawing: Drawing) -> int:
    """Return the width in CSS pixels below which a drawing scrolls rather than shrinks."""
    return round(_SMALLEST * drawing.width)


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    number = itertools.count(1)
    environment = Environment(
        loader=PackageLoader("curvfast.report.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "anchor": anchor,
        "numeric": numeric,
        "narrowest": narrowest,
        # Names of layers break after a full stop; numbers do not.
        "breakable": lambda text: Markup("<wbr>").join(re.split(r"(?<=\.)(?=[^\d\s])", text)),
        # Equal drawings get names of their own as well.
        "drawn": lambda drawing: Markup(
            drawing.svg.replace(drawing.mark, f"drawing{next(number)}")
        ),
    }
    return environment
