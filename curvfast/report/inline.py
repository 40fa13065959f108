"""Conversion of figures to deterministic inline SVG with light and dark colours."""

from __future__ import annotations

import colorsys
import hashlib
import io
import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from curvfast.report.document import Drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#1b1b1e"
_POINT = 96 / 72
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "curvfast",
    "svg.image_inline": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "auto",
    "savefig.edgecolor": "auto",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.family": "sans-serif",
}
# Elements that a page does not need, or that would affect the page outside the picture.
_DROPPED = re.compile(
    r"<\?xml.*?\?>|<!DOCTYPE.*?>|<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>"
    r"| xmlns(?::\w+)?=\"[^\"]*\"|(?<=[;\"]) ?font-family: [^;\"]*;",
    re.DOTALL,
)
_ROOT = re.compile(r"<svg[^>]*?>", re.DOTALL)
_BOX = re.compile(r'viewBox="([^"]*)"')
_COLOUR = re.compile(r"(?<=[ :\"])#([0-9a-f]{6})\b(?=[;\"])")


def inline(draw: Callable[[], Figure], *, size: tuple[float, float] | None = None) -> Drawing:
    """Return a figure as inline SVG.

    Text stays text, in the page's font. Colours become CSS variables of the page, with a second
    value from :func:`dark`; a figure with a raster image keeps its colours on a light background.
    Ids begin with the drawing's mark, a hash of its content.

    Args:
        draw: Makes the figure.
        size: Width and height in inches instead of the figure's own.

    Returns:
        The drawing; equal figures give equal bytes.
    """
    from matplotlib import rc_context

    with ExitStack() as stack:
        stack.enter_context(rc_context(_STYLE))
        figure = draw()
        if size is not None:
            figure.set_size_inches(*size)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    svg = _DROPPED.sub("", buffer.getvalue()).replace("xlink:href", "href").strip()
    box = _match(_BOX, svg)
    width = float(box.split()[2]) * _POINT
    mark = hashlib.sha256(svg.encode()).hexdigest()[:12]
    svg = _own_names(svg, mark)
    if "<image" in svg:
        return Drawing(_framed(svg, box, "raster"), width, mark)
    colours = tuple(sorted({found.group(1) for found in _COLOUR.finditer(svg)}))
    return Drawing(_framed(_COLOUR.sub(r"var(--c\1)", svg), box, "lines"), width, mark, colours)


def dark(colour: str) -> str:
    """Return a colour's value for dark mode: greys inverted, others lightened, in order.

    Args:
        colour: As ``rrggbb``.

    Returns:
        As ``rrggbb``.
    """
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4))
    hue, light, saturation = colorsys.rgb_to_hls(red, green, blue)
    grey = max(red, green, blue) - min(red, green, blue) < 0.06
    light = 0.92 - 0.78 * light if grey else 0.56 + 0.3 * light
    mixed = colorsys.hls_to_rgb(hue, light, saturation if grey else min(saturation, 0.55))
    return "".join(f"{round(255 * part):02x}" for part in mixed)


def _framed(svg: str, box: str, kind: str) -> str:
    """Replace the root element by one that CSS can size; the page's template labels it."""
    return _ROOT.sub(f'<svg class="{kind}" viewBox="{box}" aria-hidden="true">', svg, count=1)


def _own_names(svg: str, mark: str) -> str:
    """Keep only ids that are referred to, prefixed with this drawing's mark."""
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(
        r' id="([^"]*)"',
        lambda found: f' id="{mark}-{found.group(1)}"' if found.group(1) in used else "",
        svg,
    )
    return re.sub(r'(href="|url\()#', rf"\1#{mark}-", svg)


def _match(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    assert found is not None
    return found.group(1)
