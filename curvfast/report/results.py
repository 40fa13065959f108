"""Report parts from the results.json of ``curvfast demo`` and ``curvfast lab``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from curvfast.editing.report import EditReport
from curvfast.report.blocks import edit_table
from curvfast.report.document import (
    Block,
    Code,
    Picture,
    ReportPart,
    Section,
    Table,
    Text,
    Tiles,
    sections,
)
from curvfast.report.inline import inline
from curvfast.report.lab_figures import noise_study, task_study
from curvfast.report.numbers import decimal, percent
from curvfast.report.plots import frontier
from curvfast.report.provenance import MEASURED, collected, recipe, uncovered, versions

QUICK = "A quick run: every step at a size of seconds. Its figures prove nothing."
METHODS = {
    "base": "unedited",
    "kfac": "K-FAC edit",
    "svd": "truncated SVD, same size kept",
    "random": "random pairs, same number kept",
}
_NAMES = {
    "strict": "recited verbatim",
    "loose": "nearly",
    "levenshtein": "edit distance",
    "memorization": "passages recited",
    "closed_book": "closed book",
    "open_book": "open book",
    "times_table": "times table",
    "memorized": "wrong labels kept",
    "ground_truth": "their true class",
    "validation": "validation",
    "clean": "right labels kept",
    "kept_fraction": "pairs kept",
}
_PLAIN = {"perplexity": 2, "levenshtein": 3}
Results = Mapping[str, Any]


def experiment(results: Results, source: str, more: Sequence[Section] = ()) -> ReportPart:
    """Return the report part of a results.json of the demo or the lab.

    Args:
        results: Its JSON.
        source: The file, as the page names it.
        more: Sections of the files beside it, put after the figures.

    Returns:
        The part.
    """
    keys = results.keys()
    if {"tasks", "kept", "recipe"} <= keys:
        return _lab_lm(results, source, more)
    if {"statistics", "blocks", "recipe"} <= keys:
        return _lab_vit(results, source, more)
    return _demo(results, source, more)


def _demo(results: Results, source: str, more: Sequence[Section]) -> ReportPart:
    pretrained = "plan" in results
    plan = results["plan" if pretrained else "recipe"]
    title = "SmolLM2-135M, edited" if pretrained else "A small Llama that recites, edited"
    passages = results["spans"] if pretrained else plan["passages"]
    base, sweep, mass = results["base"], results["sweep"], results["mass"]
    picture = Picture(
        inline(lambda: frontier(base, sweep, chosen=mass, title=""), size=(5.3, 3.9)),
        "Passages recited verbatim over perplexity, a curve a method.",
        "Memorization against perplexity over ρ. Lower and further left is better.",
    )
    heading = f"Recited verbatim, of {passages} passages"
    figures: list[Block] = [_tiles(results, heading, "strict"), _methods(results), picture]
    return _part(title, source, results, plan, [*figures, _sweep(results)], more)


def _lab_lm(results: Results, source: str, more: Sequence[Section]) -> ReportPart:
    heads = ("task", "kind", *(METHODS[m] for m in METHODS if m in results))
    rows = tuple(
        (
            name, str(kind).replace("_", " "),
            *(
                f"{percent(results[m][f'{name}.generated'], 0)}, "
                f"{percent(results[m][f'{name}.chosen'], 0)}"
                for m in METHODS if m in results
            ),
        )
        for name, kind in results["tasks"].items()
    )  # fmt: skip
    kept = results["kept"]
    kinds = list(kept["kfac"]["generated"])
    shares = tuple(
        (f"{METHODS[method]}; {how}", *(percent(ways[how][kind], 0) for kind in kinds))
        for method, ways in kept.items()
        for how in ways
    )
    figures: list[Block] = [
        _tiles(results, "Passages recited", "memorization"),
        Picture(
            inline(lambda: task_study(results)),
            "Accuracy after the edit over accuracy before, by kind of task, and over perplexity.",
            "What an edit takes of each ability, from recitation to logic.",
        ),
        Table("Accuracy after / before", ("", *(k.replace("_", " ") for k in kinds)), shares),
        Table("Accuracy: answers generated, answers chosen", heads, rows),
        _sweep(results, ("memorization", "perplexity")),
    ]
    title = "A small Llama that learnt tasks, edited"
    return _part(title, source, results, results["recipe"], figures, more)


def _lab_vit(results: Results, source: str, more: Sequence[Section]) -> ReportPart:
    measures = _measures(results["base"])
    head = ("", *(_NAMES.get(m, m) for m in measures))
    arms = tuple(
        (", ".join(map(str, arm["statistics"].values())), *_cells(arm["matched"], measures))
        for arm in results["statistics"]
    )
    blocks = tuple(
        (
            f"{', '.join(map(str, part['blocks']))}; {METHODS[method]}",
            *_cells(point[method], measures),
        )
        for part in results["blocks"]
        for point in part["sweep"]
        if point["mass"] == results["mass"]
        for method in ("kfac", "svd")
    )
    figures: list[Block] = [
        _tiles(results, "Wrong labels kept", "memorized", "validation"),
        _methods(results),
        Picture(
            inline(lambda: noise_study(results)),
            "Shares of pictures over the kept fraction; wrong labels kept against validation.",
            "What an edit does to a model that learnt wrong labels by heart.",
        ),
        Table("Curvature measured on (pictures, tokens, labels), as many pairs kept", head, arms),
        Table(f"Blocks edited, ρ = {results['mass']:g}", head, blocks),
        _sweep(results),
    ]
    title = "A vision transformer that learnt wrong labels, edited"
    return _part(title, source, results, results["recipe"], figures, more)


def _part(
    title: str,
    source: str,
    results: Results,
    plan: Mapping[str, Any],
    figures: Sequence[Block],
    more: Sequence[Section],
) -> ReportPart:
    edit = results.get("edit")
    report = None if edit is None else EditReport.from_dict(edit)
    factors = {} if report is None else report.provenance.get("factors", {})
    # The curvature saved beside results has a provenance too.
    measured = [block for each in more if each.title == MEASURED for block in each.blocks]
    command = results.get("command")
    own = sections(
        ("Results", figures),
        *((each.title, each.blocks) for each in more if each.title != MEASURED),
        ("The edit", [] if report is None else edit_table(report)),
        (MEASURED, [collected(factors), uncovered(factors)] if factors else measured),
        ("Where it comes from", [versions(results), recipe(plan, "The recipe"), _time(results)]),
        ("To make it again", [again(str(command))] if command else []),
    )
    quick = QUICK if command and "--quick" in command.split() else ""
    return ReportPart(title, source, own, quick)


def again(command: str) -> Code:
    """Return the commands that reproduce the results and this page."""
    return Code(f"{command} --out DIR\ncurvfast report DIR")


def _tiles(results: Results, what: str, key: str, other: str = "perplexity") -> Tiles:
    """Return tiles of an edit: what it removes, its cost, and the kept share."""
    base, kfac = results["base"], results["kfac"]
    return Tiles(
        (
            (what, _cell(base, key), _cell(kfac, key)),
            (_NAMES.get(other, other).capitalize(), _cell(base, other), _cell(kfac, other)),
            (
                f"Pairs kept, ρ = {results['mass']:g}",
                percent(1, 0), _cell(kfac, "kept_fraction"),
            ),
        )
    )  # fmt: skip


def _methods(results: Results) -> Table:
    """Return a table of the unedited model and of each edit method."""
    measures = _measures(results["base"])
    rows = tuple(
        (label, *_cells(results[key], measures)) for key, label in METHODS.items() if key in results
    )
    head = ("", *(_NAMES.get(measure, measure) for measure in measures))
    return Table(f"Before and after, ρ = {results['mass']:g}", head, rows)


def _sweep(results: Results, measures: Sequence[str] | None = None) -> Table:
    """Return a collapsed table of every point of a sweep over ρ."""
    names = [*(measures or _measures(results["base"])[:-1]), "kept_fraction"]
    rows = tuple(
        (f"{point['mass']:g}", METHODS[method].split(",")[0], *_cells(point[method], names))
        for point in results["sweep"]
        for method in METHODS
        if method in point
    )
    head = ("ρ", "method", *(_NAMES.get(name, name) for name in names))
    return Table("Every ρ", head, rows, folded=True)


def _measures(figures: Mapping[str, Any]) -> list[str]:
    """Return the names of an experiment's figures, the kept fraction last."""
    return [*(name for name in figures if name != "kept_fraction"), "kept_fraction"]


def _cells(figures: Mapping[str, Any], measures: Sequence[str]) -> tuple[str, ...]:
    return tuple(_cell(figures, measure) for measure in measures)


def _cell(figures: Mapping[str, Any], measure: str) -> str:
    value = figures.get(measure)
    digits = _PLAIN.get(measure)
    return percent(value) if digits is None else decimal(value, digits)


def _time(results: Results) -> Text | None:
    seconds = results.get("seconds")
    return None if seconds is None else Text(f"It took {seconds:,.0f} seconds.")
