"""A report shows what is in a folder, says what it could not show, and is made of text alone."""

from __future__ import annotations

import html
import json
import re
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import reports
import torch
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from curvfast.cli import main
from curvfast.errors import FormatError, InputError
from curvfast.experiments.studies.report_part import study_part
from curvfast.experiments.studies.runs import STUDIES
from curvfast.experiments.studies.study import Study
from curvfast.kfac.selection.staircase import Staircase, staircase_by_mass
from curvfast.report import blocks as shown_blocks
from curvfast.report.blocks import spectra, staircases
from curvfast.report.curvature import curvature_of, outline, read_curvature, sampled, save_curvature
from curvfast.report.document import Drawing, Picture, ReportPage, ReportPart, Table, Text, sections
from curvfast.report.folder import read_folder
from curvfast.report.inline import dark, inline
from curvfast.report.provenance import collected
from curvfast.report.recitals import Continuation, marked, read_passages, save_passages
from curvfast.report.render import render

VOID = {"meta", "link", "img", "br", "wbr", "hr", "input"}


class Page(HTMLParser):
    """What a page holds, and whether its tags are balanced."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[int] = []
        self.words: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def no_study(folder: Path, source: str, trouble: Callable[[str, str], None]) -> None:
    raise AssertionError("there is no study here")


def shown(folder: Path) -> str:
    return render(read_folder(folder, no_study))


@pytest.fixture
def tiny_study(monkeypatch: pytest.MonkeyPatch) -> None:
    def picture(found: Any) -> Figure:
        figure = Figure(figsize=(2, 2))
        figure.subplots().plot([run["share"] for run in found])
        return figure

    def unmeasured(ask: Any) -> Any:
        raise AssertionError("a report measures nothing")

    def tables(found: Any) -> dict[str, list[list[str]]]:
        return {"shares": [["", "share"], *(["run", f"{run['share']:.2f}"] for run in found)]}

    monkeypatch.setitem(STUDIES, "figure3", Study(unmeasured, tables, picture))


def test_the_demo_is_shown_whole(tmp_path: Path) -> None:
    page = Page(shown(reports.demo(tmp_path)))
    for told in (
        "100.0% → before, 1.6% after", "65.20 → before, 70.30 after",  # what matters most
        "K-FAC edit 1.6% 3.1% 0.764 70.30 30.0%",  # each method
        "mlp. up_proj 25,225 51.3% 95.0% 47.3% 78.1%",  # each layer
        "Llama, 1,234,567 parameters, tiny", "weights in bfloat16", "tokens 4,321",
        "sampled from the model's own prediction", "of the summed loss", "float32",
        "torch 2.13.0", "seed 11", "length 128", "curvfast demo --seed 4 --out DIR",
        "1 of 64.", "In the beginning God", "Every ρ", "It took 142 seconds",
    ):  # fmt: skip
        assert told in page.text, told
    assert "/somewhere" not in page.text
    assert "quick run" not in page.text
    # Frontier, mass curves, spectrum and staircase.
    assert len(page.all("svg")) == 4


@pytest.mark.parametrize(
    ("make", "told", "pictures"),
    [
        (reports.lab_lm, ["sums arithmetic 70%, 80%", "A quick run", "people 8"], 1),
        (reports.lab_vit, ["80.0% → before, 80.0% after", "fresh, cls, sampled 80.0%",
                           "0, 3; K-FAC edit 80.0%", "train images 200"], 1),
    ],
    ids=["lm", "vit"],
)  # fmt: skip
def test_the_lab_is_shown(
    make: Callable[[Path], Path], told: list[str], pictures: int, tmp_path: Path
) -> None:
    page = Page(shown(make(tmp_path)))
    for each in told:
        assert each in page.text, each
    assert len(page.all("svg")) == pictures


@pytest.mark.usefixtures("tiny_study")
def test_a_study_is_drawn_over_its_seeds(tmp_path: Path) -> None:
    reports.study(tmp_path / "figure3", (0, 2, 10))
    reports.write(tmp_path / "figure3" / "seed-3.json", {"schema_version": 1})
    document = read_folder(tmp_path, study_part)
    page = Page(render(document))
    for told in (
        "run 0.50 run 0.70 run 1.50", "seeds 0, 2, 10", "Figure 3 of arXiv 2510.24256",
        "curvfast study figure3 --seeds 0 2 10", "2 12 10",
    ):  # fmt: skip
        assert told in page.text, told
    assert len(page.all("svg")) == 1
    assert [trouble.path for trouble in document.troubles] == ["figure3/seed-3.json"]


@pytest.mark.usefixtures("tiny_study")
@pytest.mark.parametrize(
    ("one", "two", "told"),
    [
        ("figure3", "table2", "seeds of figure3 and table2: not one study"),
        ("of tomorrow", "of tomorrow", "seeds of of tomorrow: not one study"),
    ],
)
def test_a_folder_of_two_studies_or_an_unknown_one_is_no_study(
    one: str, two: str, told: str, tmp_path: Path
) -> None:
    reports.study(tmp_path / "s", (0,), study=one)
    reports.study(tmp_path / "s", (1,), study=two)
    reports.demo(tmp_path)
    (trouble,) = read_folder(tmp_path, study_part).troubles
    assert trouble.path == "s"
    assert trouble.reason.startswith(told)


def test_what_the_library_saved_is_one_part(tmp_path: Path) -> None:
    basis = reports.saved(tmp_path)
    document = read_folder(tmp_path, no_study)
    (part,) = document.parts
    page = Page(render(document))
    kept = basis.keep(mass=0.7)
    share = kept["up"].fraction
    for told in (
        f"up: {share:.1%} of the pairs", "ranked by kfac", "at ρ = 0.8",
        "normalisation: not a linear map 1", 'curvfast.Factors.from_pretrained("factors")',
        "curvfast.edit(model, basis, mass=0.8)", "Patches", "4,321 a layer",
    ):  # fmt: skip
        assert told in page.text, told
    assert [section.title for section in part.sections] == [
        "What was measured", "Spectra", "Staircases", "Edits", "Where it comes from",
        "To make it again",
    ]  # fmt: skip


def test_a_saved_folder_alone_and_an_edited_checkpoint_are_shown(tmp_path: Path) -> None:
    reports.saved(tmp_path / "all")
    alone = Page(shown(tmp_path / "all" / "factors"))
    assert "4,321 a layer" in alone.text
    assert "what an edit at ρ = 0.9 would keep" in alone.text
    reports.write(tmp_path / "model" / "config.json", {"architectures": ["Llama"]})
    edit = {"kind": "curvfast-edit", **reports.edit_report().to_dict()}
    reports.write(tmp_path / "model" / "curvfast.json", edit)
    document = read_folder(tmp_path / "model", no_study)
    assert "25,225 51.3%" in Page(render(document)).text
    assert not document.troubles


@pytest.mark.parametrize(
    ("without", "told"),
    [
        (["basis"], "As selected"),
        (["selection"], "What the edit at ρ = 0.8 keeps."),
        (["selection", "edit.json", "patch"], "what an edit at ρ = 0.9 would keep"),
    ],
)
def test_parts_stand_in_for_each_other(without: list[str], told: str, tmp_path: Path) -> None:
    basis = reports.saved(tmp_path)
    whole = shown(tmp_path)
    for name in without:
        place = tmp_path / name
        place.unlink() if place.suffix else shutil.rmtree(place)
    page = shown(tmp_path)
    assert told in Page(page).text
    # Spectra are the same, whether of the basis or of the factors.
    row = re.search(r"Spectra in numbers</summary>.*?</table>", whole, re.DOTALL)
    assert row
    assert row.group() in page
    if told.startswith("What the edit"):
        assert f"{basis.keep(mass=0.8)['up'].fraction:.1%} of the pairs" in Page(page).text


@pytest.mark.parametrize("make", [reports.demo, reports.lab_lm, reports.lab_vit, reports.saved])
def test_a_page_loads_nothing_is_ordered_and_says_what_pictures_show(
    make: Callable[[Path], Any], tmp_path: Path
) -> None:
    make(tmp_path)
    text = shown(tmp_path)
    assert "http:" not in text
    assert "https:" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed", "base"}
    for _, attributes in page.tags:
        for name in ("src", "href"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:,"))
            if target != "#" and target.startswith("#"):
                assert f'id="{target[1:]}"' in text
        assert not [name for name in attributes if name.startswith("on")]
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(names) == len(set(names))
    assert page.headings[0] == 1
    assert all(b - a <= 1 for a, b in zip(page.headings, page.headings[1:], strict=False))
    assert page.all("html") == [{"lang": "en"}]
    drawn = [a for a in page.all("div") if a.get("role") == "img"]
    assert len(drawn) == len(page.all("svg"))
    assert all(a["aria-label"] and a["title"] for a in drawn)
    assert {a.get("scope") for a in page.all("th")} == {"col", "row"}
    assert len(page.all("caption")) == len(page.all("table"))


def test_text_of_models_and_files_is_never_markup(tmp_path: Path) -> None:
    evil = reports.EVIL
    folder = reports.demo(tmp_path / "a<b>&c", evil, command=evil, versions={evil: evil})
    texts = [Continuation(evil, evil, evil, f"{evil} {evil}")]
    save_passages(folder / "passages.json", texts, chosen=evil)
    reports.write(folder / "edit.json", reports.edit_report(evil).to_dict())
    reports.write(folder / f"{evil.replace('/', '')}.json", {"kind": "curvfast-passages"})
    page = shown(folder)
    assert "<img" not in page
    assert "</script>" not in page
    assert "a<b>" not in page
    found = Page(page)
    assert found.text.count("{{ 7 * 7 }}") >= 10
    assert not found.all("img")
    assert html.escape("a<b>&c") in page


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    reports.demo(tmp_path / "one" / "results")
    reports.saved(tmp_path / "one" / "results" / "own")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    first, second = (shown(tmp_path / name / "results") for name in ("one", "two"))
    assert first == second
    assert str(tmp_path) not in first
    assert not re.search(r"\b20\d\d-\d\d-\d\d", first)


def test_what_cannot_be_read_is_said_and_the_rest_is_shown(tmp_path: Path) -> None:
    reports.demo(tmp_path)
    reports.saved(tmp_path / "own")
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    reports.write(tmp_path / "later.json", {"kind": "curvfast-curvature", "version": 9})
    reports.write(tmp_path / "half" / "results.json", {"base": {}, "kfac": {}, "sweep": [],
                                                       "mass": 1, "recipe": {},
                                                       "statistics_rows": 1})  # fmt: skip
    reports.write(tmp_path / "stranger.json", {"layers": 3})
    reports.write(tmp_path / "edited" / "config.json", {"model_type": "llama"})
    reports.write(tmp_path / "edited" / "tokenizer.json", {"model": 1})
    reports.write(tmp_path / "own" / "sums" / "config.json", {"kind": "curvfast-corrections"})
    (tensors,) = (tmp_path / "own" / "selection").glob("*.safetensors")
    tensors.write_bytes(b"\0" * tensors.stat().st_size)
    document = read_folder(tmp_path, no_study)
    reasons = {trouble.path: trouble.reason for trouble in document.troubles}
    assert set(reasons) == {
        "broken.json", "later.json", "stranger.json", "half/results.json", "own/selection",
        "own/sums",
    }  # fmt: skip
    assert "left out" in reasons["stranger.json"]
    assert reasons["own/sums"] == "holds curvfast-corrections, which a report does not show"
    assert "JSON" in reasons["broken.json"]
    assert "version 9" in reasons["later.json"]
    assert "KeyError: 'passages'" in reasons["half/results.json"]
    assert "damaged" in reasons["own/selection"]
    assert str(tmp_path) not in render(document)
    page = Page(render(document))
    assert len(document.parts) == 2
    assert "What the edit at ρ = 0.8 keeps." in page.text
    for reason in reasons.values():
        assert " ".join(reason.split()) in page.text


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "curvfast demo --out DIR"),
        ({"notes.json": "[1, 2]"}, "notes.json: nothing that a report knows"),
        ({"results.json": "{"}, "results.json: cannot be read as JSON"),
    ],
    ids=["empty", "foreign", "damaged"],
)
def test_a_folder_without_results_is_refused(
    files: dict[str, str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 1
    printed = capsys.readouterr().err
    assert told in printed
    assert "curvfast study" in printed
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(InputError, match="no folder"):
        read_folder(tmp_path / "missing", no_study)


def test_the_command_writes_one_file_and_tells_of_troubles(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports.demo(tmp_path / "in")
    (tmp_path / "in" / "broken.json").write_text("{", encoding="utf-8")
    assert main(["report", str(tmp_path / "in")]) == 0
    printed = capsys.readouterr()
    assert "not shown: broken.json" in printed.err
    assert printed.out == ""
    page = (tmp_path / "in" / "report.html").read_text(encoding="utf-8")
    assert main(["-q", "report", str(tmp_path / "in"), "--out", str(tmp_path / "p.html")]) == 0
    assert (tmp_path / "p.html").read_text(encoding="utf-8") == page
    assert page.startswith("<!doctype html>")


def test_a_missing_package_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reports.demo(tmp_path)
    for package in ("jinja2", "matplotlib"):
        with monkeypatch.context() as hidden:
            hidden.setitem(sys.modules, package, None)
            assert main(["report", str(tmp_path)]) == 1
        assert "pip install 'curvfast[report]'" in capsys.readouterr().err


def test_words_that_are_not_the_truth_are_marked() -> None:
    def said(text: str) -> list[str]:
        pieces = marked("And God said, Let there be light", text)
        assert "".join(piece.text for piece in pieces) == text
        return [piece.text for piece in pieces if piece.differs]

    assert said("And God said, Let there be light") == []
    assert said("And God said, Let there be dark night") == ["dark night"]
    # A word left out, put in, or spaced otherwise does not make what follows differ.
    assert said("And said,  Let\nthere be light") == []
    assert said("And the God said, Let there be light") == ["the"]
    assert said("  nothing of it ") == ["nothing of it "]
    assert said("") == []


def test_passages_survive_the_disk_and_damage_is_told(tmp_path: Path) -> None:
    passages = [Continuation("a", "b", "c", "d\n"), Continuation("é", "ρ", "", " ")]
    save_passages(tmp_path / "p.json", passages, chosen="both")
    content = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    assert read_passages(content) == (passages, "both")
    with pytest.raises(InputError, match="no passage"):
        save_passages(tmp_path / "q.json", [])
    for damaged in (
        {**content, "version": 2}, {**content, "passages": [{"prompt": "a"}]},
        {**content, "passages": [{**content["passages"][0], "truth": 3}]},
        {key: value for key, value in content.items() if key != "chosen"},
    ):  # fmt: skip
        with pytest.raises(FormatError, match=r"damaged|version 2"):
            read_passages(damaged)


def test_curvature_survives_the_disk(tmp_path: Path) -> None:
    basis = reports.factors().eigh()
    kept = basis.keep(mass=0.8)
    save_curvature(tmp_path / "c.json", basis, kept)
    layers, provenance = read_curvature(
        json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    )
    assert provenance == dict(basis.provenance)
    assert set(layers) == set(basis)
    layer, stairs = layers["mlp.up_proj"], layers["mlp.up_proj"].stairs
    assert stairs is not None
    assert layer.values_a == tuple((j + 1, pytest.approx(2.0**-j, rel=1e-4)) for j in range(8))
    assert (stairs.pairs, stairs.mass) == (kept["mlp.up_proj"].pairs, kept["mlp.up_proj"].mass)
    assert _widths(stairs.corners, 6) == kept["mlp.up_proj"].widths.tolist()
    damaged = {"kind": "curvfast-curvature", "version": 1, "layers": {"x": {}}, "provenance": {}}
    with pytest.raises(FormatError, match="damaged"):
        read_curvature(damaged)


def _widths(corners: tuple[tuple[int, int], ...], rows: int) -> list[int]:
    return [max((c for c in corners if c[0] <= row), key=lambda c: c[0])[1] for row in range(rows)]


def test_outlines_are_small_and_true() -> None:
    values = torch.logspace(0, -6, 3000, dtype=torch.float64)
    points = sampled(values)
    assert len(points) <= 40
    assert points[0] == (1, 1.0)
    assert points[-1][0] == 3000
    assert all(v == pytest.approx(float(values[n - 1]), rel=1e-4) for n, v in points)
    kept = staircase_by_mass(values, values, 0.9)
    found = outline(kept)
    assert len(found.corners) <= 48
    assert (found.rows, found.columns, found.pairs) == (3000, 3000, kept.pairs)
    assert all(int(kept.widths[row]) == width for row, width in found.corners)
    assert found.corners[0][0] == 0
    assert found.corners[-1][1] == 0
    flat = outline(Staircase(torch.full((4,), 3, dtype=torch.int32), 5, 0.1, 0.9))
    assert flat.corners == ((0, 3),)


def test_many_layers_are_drawn_evenly_and_all_are_in_the_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shown_blocks, "inline", lambda draw: Drawing("", 1.0, ""))
    names = tuple(f"layers.{i}.up" for i in range(60))
    basis = reports.factors(names).eigh()
    layers = curvature_of(basis, basis.keep(mass=0.9))
    _, gallery, table = spectra(layers)
    (stairs,) = staircases({n: layer.stairs for n, layer in layers.items() if layer.stairs})
    for each in (gallery, stairs):
        assert len(each.pictures) == 24
        assert "24 of 60 layers" in each.caption
    assert gallery.pictures[0].caption == names[0]
    assert int(gallery.pictures[-1].caption.split(".")[1]) > 55
    assert [row[0] for row in table.rows] == list(names)


def _lines(colour: str, *, raster: bool = False) -> Callable[[], Figure]:
    def draw() -> Figure:
        figure = Figure(figsize=(3, 2))
        axes = figure.subplots()
        axes.plot([1, 2], [2, 1], color=colour, marker="o", label="<a> & b")
        axes.legend()
        if raster:
            axes.imshow([[0, 1], [1, 0]])
        return figure

    return draw


def test_drawings_are_equal_for_equal_figures_and_share_no_name() -> None:
    green, red = inline(_lines("#0b6e4f")), inline(_lines("#c8553d"))
    assert inline(_lines("#0b6e4f")) == green
    ids = [set(re.findall(r' id="([^"]+)"', drawing.svg)) for drawing in (green, red)]
    assert ids[0]
    assert not ids[0] & ids[1]
    for name in re.findall(r'(?:href="|url\()#([^")]+)', green.svg):
        assert name in ids[0]
    assert "&lt;a&gt; &amp; b" in green.svg
    assert green.width == pytest.approx(288)


def test_colours_of_lines_follow_the_page_and_rasters_keep_theirs() -> None:
    lines = inline(_lines("#0b6e4f"))
    assert "0b6e4f" in lines.colours
    assert not re.search(r"[ :]#[0-9a-f]{6}\b", lines.svg)
    assert set(re.findall(r"var\(--c(\w+)\)", lines.svg)) == set(lines.colours)
    raster = inline(_lines("#0b6e4f", raster=True))
    assert raster.colours == ()
    assert 'class="raster"' in raster.svg
    assert "data:image/png" in raster.svg
    picture = Picture(lines, "title", "caption")
    part = page_of(picture)
    page = render(part)
    assert "--c0b6e4f: #0b6e4f;" in page
    assert f"--c0b6e4f: #{dark('0b6e4f')};" in page


def page_of(*blocks: Any) -> ReportPage:
    return ReportPage("d", (ReportPart("p", "s", sections(("t", blocks))),))


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_dark_colours_can_be_told_from_a_dark_ground_and_keep_their_order() -> None:
    ground = _luminance("15171a")
    used = ["1b1b1e", "0b6e4f", "c8553d", "8d99ae", "000000", "1f77b4", "d62728", "440154"]
    for colour in used:
        assert (_luminance(dark(colour)) + 0.05) / (ground + 0.05) > 4.5, colour
    scale = [dark(to_hex(colormaps["Greys"](i / 8))[1:]) for i in range(9)]
    lights = [_luminance(colour) for colour in scale]
    assert lights == sorted(lights)


def test_columns_of_numbers_are_aligned_as_such() -> None:
    table = Table("c", ("name", "n", "words"), (("1", "2.5%", "a"), ("2", "1.0 ± 0.2", "3" * 33)))
    page = Page(render(page_of(table, Text("words"))))
    assert [a["class"] for a in page.all("td")] == ["short number", "short", "short number", ""]
    assert [a.get("class") for a in page.all("th")][:3] == [None, "number", None]


def test_rules_are_shown_with_who_said_so_and_how_sure_that_is() -> None:
    last = {"rule": "all but the last", "by": "labels", "how": "proven", "left_out": 0.0}
    facts = reports.provenance(("up", "down"))
    before = dict(collected(facts).entries)
    assert "last position of each sequence" in before["gradients"]
    assert "rows that count" not in before
    facts["known"] = {"unit": {**last, "rule": "1/s"}, "rows": {"up": last, "down": last}}
    shown = dict(collected(facts).entries)
    assert shown["rows that count"] == "all but the last (proven: labels)"
    assert shown["unit of G"] == "1/s (proven: labels)"
    assert shown["gradients"] == "of the summed loss."
    facts["known"]["rows"]["down"] = {**last, "how": "told", "by": "rows="}
    assert dict(collected(facts).entries)["rows that count"] == (
        "all but the last (proven: labels): 1 layers; all but the last (told: rows=): 1 layers"
    )
    # A page is made of damaged provenance too.
    facts["known"] = {"unit": None, "rows": {"up": {}}}
    assert "unit of G" not in dict(collected(facts).entries)
