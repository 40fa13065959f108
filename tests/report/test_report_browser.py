"""A report in a browser: legible at the width of a desk and of a hand, and it asks for nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import reports
from matplotlib.figure import Figure

from curvfast.report.document import (
    Code,
    Facts,
    Picture,
    ReportPage,
    ReportPart,
    Table,
    Text,
    sections,
)
from curvfast.report.folder import read_folder
from curvfast.report.inline import inline
from curvfast.report.recitals import Continuation, save_passages
from curvfast.report.render import render

WIDTHS = (1280, 390)
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
LONG = "model.layers.23.a_very_long_name_without_any_place_to_break_it_whatsoever.gate_proj"
# Frames of each width; what each measures is written where --dump-dom shows it.
_FRAMES = """<!doctype html><link rel="icon" href="data:,"><body>{frames}<pre></pre><script>
onload = () => {{
  const found = {{}};
  for (const frame of document.querySelectorAll("iframe")) {{
    const page = frame.contentDocument, root = page.documentElement;
    for (const folded of page.querySelectorAll("details")) folded.open = true;
    found[frame.width] = {{
      inner: frame.contentWindow.innerWidth,
      scroll: root.scrollWidth,
      sticky: frame.contentWindow.getComputedStyle(page.querySelector("nav")).position,
      smallest: Math.min(...[...page.querySelectorAll("svg text")].map(
        (t) => t.getBoundingClientRect().height)),
      boxes: [...page.querySelectorAll(".scroll")].filter(
        (box) => box.scrollWidth > box.clientWidth).length,
      loaded: frame.contentWindow.performance.getEntriesByType("resource").map((e) => e.name),
    }};
  }}
  document.querySelector("pre").textContent = JSON.stringify(found);
}};</script>"""

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason=f"needs a Chromium on the PATH: one of {', '.join(NAMES)}"
)


def _panels() -> Figure:
    figure = Figure(figsize=(13.5, 4))
    for axes in figure.subplots(1, 3):
        axes.set_xlabel("a label of three panels", fontsize=9)
    return figure


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page of everything that is wide: names, tables, words and commands."""
    folder = reports.demo(tmp_path_factory.mktemp("report") / ("results-" * 20), LONG)
    endless = "x" * 300
    save_passages(
        folder / "passages.json", [Continuation(endless, f"a {endless}", endless, "b " * 200)]
    )
    found = read_folder(folder, lambda *told: None)
    wide = Table("A wide table " * 9, tuple(f"column {i}" for i in range(30)), (("1234567",) * 30,))
    picture = Picture(inline(_panels), "Three panels.", endless)
    blocks = (
        wide,
        picture,
        Code(f"curvfast {endless}"),
        Facts(((endless, endless),)),
        Text(endless),
    )
    part = ReportPart(endless, endless, sections((endless, blocks)), note=endless)
    return render(ReportPage(found.title, (*found.parts, part), found.troubles))


@pytest.fixture(scope="module")
def seen(page: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What frames of each width measure, and what was asked of any host."""
    asked: list[str] = []
    frames = "".join(f'<iframe src="/report" width="{w}" height="800"></iframe>' for w in WIDTHS)

    class Host(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = self.headers["Host"].split(":")[0]
            # A browser asks its maker for the time of day, and so on: in no page's name.
            if host == "here.test" or "here.test" in self.headers.get("Referer", ""):
                asked.append(f"{host}{self.path}")
            body = (page if self.path == "/report" else _FRAMES.format(frames=frames)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *told: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    profile: Path = tmp_path_factory.mktemp("profile")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={profile}", "--window-size=1400,900",
        # Whatever host a page names, it is asked here.
        f"--host-resolver-rules=MAP * 127.0.0.1:{server.server_port}",
        "--virtual-time-budget=5000", "--dump-dom", "http://here.test/",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    finally:
        server.shutdown()
        server.server_close()
    told = re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert told, done.stderr
    return {"asked": asked, **json.loads(told.group(1).replace("&amp;", "&"))}


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_reaches_beyond_the_page(seen: dict[str, Any], width: int) -> None:
    found = seen[str(width)]
    assert found["inner"] == width
    assert found["scroll"] <= found["inner"]
    # What is too wide scrolls in its own box.
    assert found["boxes"] >= 1


@pytest.mark.parametrize("width", WIDTHS)
def test_letters_of_pictures_can_be_read(seen: dict[str, Any], width: int) -> None:
    assert seen[str(width)]["smallest"] >= 8


def test_the_contents_stay_beside_a_wide_page_only(seen: dict[str, Any]) -> None:
    assert [seen[str(width)]["sticky"] for width in WIDTHS] == ["sticky", "static"]


def test_the_page_asks_for_nothing(seen: dict[str, Any]) -> None:
    assert sorted(set(seen["asked"])) == ["here.test/", "here.test/report"]
    assert [seen[str(width)]["loaded"] for width in WIDTHS] == [[], []]
