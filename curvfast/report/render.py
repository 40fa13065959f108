"""Rendering of a report page as one self-contained HTML file."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from curvfast._version import __version__
from curvfast.report.document import Drawing, ReportPage, drawings
from curvfast.report.inline import dark

if TYPE_CHECKING:
    from jinja2 import Environment

_NUMBER = re.compile(r"[-−+]?[\d.,]+(e[-+]?\d+)?( ?%)?( ± [\d.,]+)?|–|nan|inf")
# Share of a drawing's natural width below which its text is too small to read.
_SMALLEST = 0.66


def render(document: ReportPage) -> str:
    """Render a page as one HTML file: styles and drawings inlined, no script, no request.

    All text is escaped, except the markup of drawings.

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
    """Return an anchor id for a place in the page, of letters, digits and hyphens."""
    words = re.findall(r"[a-z0-9]+", " ".join(titles).lower())
    return "-".join(words) or "part"


def numeric(rows: Sequence[Sequence[str]], column: int) -> bool:
    """Return whether a column holds numbers only and is to be right-aligned."""
    return all(_NUMBER.fullmatch(row[column].strip() or "0") for row in rows)


def narrowest(drawing: Drawing) -> int:
    """Return the width in CSS pixels below which a drawing scrolls rather than shrinks."""
    return round(_SMALLEST * drawing.width)


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    number = itertools.count(1)
    environment = Environment(
        loader=PackageLoader("curvfast.report"),
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
        # Layer names may break after a full stop; numbers may not.
        "breakable": lambda text: Markup("<wbr>").join(re.split(r"(?<=\.)(?=[^\d\s])", text)),
        # Equal drawings get distinct ids too.
        "drawn": lambda drawing: Markup(
            drawing.svg.replace(drawing.mark, f"drawing{next(number)}")
        ),
    }
    return environment
