"""Writes every table of the READMEs from the JSON of the runs, so that no figure is typed by hand.

python benchmarks/table.py            print the documents as they should be
python benchmarks/table.py --write    put the tables between their markers
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tables_cpu
import tables_studies
from results import CPU

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "benchmarks" / "results" / "demo"
_OTHERS = ("cpu", "demo", "dry-run", "frontier", "studies")
METHODS = (
    ("base", "unedited"),
    ("kfac", "**K-FAC edit**"),
    ("svd", "truncated SVD, same size kept"),
    ("random", "random pairs, same number kept"),
)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return rows as a table, the first being its head."""
    head, *body = lines
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *body))


def trained() -> str:
    """The demo's own model: a column a seed."""
    runs = [load(DEMO / f"lm-seed{seed}.json") for seed in (0, 1, 2)]
    head = ["recited verbatim → perplexity", *(f"seed {run['recipe']['seed']}" for run in runs)]
    head.append("kept")
    rows = [
        [
            label,
            *(f"{run[key]['strict']:.1%} → {run[key]['perplexity']:.1f}" for run in runs),
            f"{runs[0][key]['kept_fraction']:.0%}",
        ]
        for key, label in METHODS
    ]
    return markdown([head, *rows])


def pretrained() -> str:
    """SmolLM2: a column a measure."""
    run = load(DEMO / "smollm-seed0.json")
    columns = (
        ("strict", "spans recited", "{:.0%}"), ("perplexity", "perplexity", "{:.1f}"),
        ("closed_book", "capitals, from memory", "{:.0%}"),
        ("open_book", "capitals, from the prompt", "{:.0%}"),
        ("addition", "addition", "{:.0%}"), ("times_table", "times table", "{:.0%}"),
    )  # fmt: skip
    rows = [
        [label, *(form.format(run[key][column]) for column, _, form in columns)]
        for key, label in METHODS
        if key in run
    ]
    return markdown([["", *(heading for _, heading, _ in columns)], *rows])


def gpu(results: Mapping[str, Any]) -> str:
    """Second moments and projections on a GPU, from what benchmarks/device.sh wrote."""
    head = ["", "rows × d", "ms", "of the best of cuBLAS", "dense-equivalent TFLOP/s", "error"]
    rows = [
        [
            f"second moment, {row['dtype']}", f"{row['rows']} × {row['d']}", f"{row['ms']:.3f}",
            f"{row['ratio_best_cublas']:.2f}×", f"{row['tflops_dense_equivalent']:.0f}",
            f"{row['error']:.0e}",
        ]
        for row in results.get("second_moment", []) if "ms" in row
    ]  # fmt: skip
    rows += [
        [
            f"projection, ρ = {row['mass']}", f"{row['rows']} × {row['columns']}",
            f"{row['ours']:.3f}", f"{row['ratio']:.2f}×", "", f"{row['error']:.0e}",
        ]
        for row in results.get("projection", []) if "ours" in row
    ]  # fmt: skip
    facts = results["environment"]
    return f"{facts['gpu']}, torch {facts['torch']}:\n\n{markdown([head, *rows])}"


def newest_gpu() -> Mapping[str, Any] | None:
    """Return the latest results of a GPU, its parts as one, or None if none ever ran."""
    folders = [f for f in DEMO.parent.iterdir() if f.is_dir() and f.name not in _OTHERS]
    return merged([load(path) for folder in folders for path in folder.glob("*.json")])


def merged(runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the latest run with what earlier ones of its GPU and commit have beside it."""
    ordered = sorted(runs, key=lambda run: run["environment"]["time"])
    if not ordered:
        return None

    def origin(run: Mapping[str, Any]) -> tuple[str, str]:
        return run["environment"]["gpu"], run["environment"]["commit"]

    same = [run for run in ordered if origin(run) == origin(ordered[-1])]
    return {key: value for run in same for key, value in run.items()}


def load(path: Path) -> Mapping[str, Any]:
    """Read one run."""
    found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def filled(text: str) -> str:
    """Return a text with its marked tables filled in from the runs.

    Raises:
        ValueError: If it has a marker of an unknown table.
    """
    studied = tables_studies.tables()
    for name in re.findall(r"<!-- ([a-z0-9-]+) -->", text):
        if name not in TABLES and name not in studied:
            known = ", ".join([*TABLES, *studied])
            raise ValueError(f"there is no table {name!r}; there are {known}")
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        table = markdown(studied[name]) if name in studied else TABLES[name]()
        text = re.sub(pattern, lambda m, t=table: m[1] + t + "\n" + m[2], text, flags=re.S)
    return text


def _cpu(file: str, table: Callable[[Any], Sequence[Sequence[str]]]) -> Callable[[], str]:
    def make() -> str:
        found = load(CPU / file)
        return f"{markdown(table(found))}\n\n{tables_cpu.machine(found)}."

    return make


def _frontier(setting: str, name: str) -> Callable[[], str]:
    def make() -> str:
        from frontier import table

        found = table.runs(setting)
        return markdown(getattr(table, name)(found)) if found else "Not measured yet."

    return make


def _newest() -> str:
    measured = newest_gpu()
    return "None was at hand." if measured is None else gpu(measured)


TABLES: dict[str, Callable[[], str]] = {
    "trained": trained,
    "pretrained": pretrained,
    "frontier-lm": _frontier("lm", "recited"),
    "frontier-lm-detailed": _frontier("lm", "detailed"),
    "frontier-smollm": _frontier("smollm", "recited"),
    "frontier-smollm-detailed": _frontier("smollm", "detailed"),
    "gpu": _newest,
    "second-moments": _cpu("bench.json", tables_cpu.second_moments),
    "races": _cpu("bench.json", tables_cpu.races),
    "peers": _cpu("peers.json", lambda found: tables_cpu.peers(found, "peers")),
    "peers-wide": _cpu("peers.json", lambda found: tables_cpu.peers(found, "wide")),
    "peers-words": _cpu("peers.json", lambda found: tables_cpu.peers(found, "words")),
    "peers-sampled": _cpu("peers.json", lambda found: tables_cpu.peers(found, "sampled")),
    "scaling": _cpu("scaling.json", tables_cpu.scaling),
    "shares": _cpu("profile.json", tables_cpu.shares),
}
DOCUMENTS = tuple(
    ROOT / folder / "README.md"
    for folder in (".", "benchmarks", "benchmarks/frontier", "benchmarks/studies")
)


if __name__ == "__main__":
    for path in DOCUMENTS:
        text = filled(path.read_text(encoding="utf-8"))
        if sys.argv[1:] == ["--write"]:
            path.write_text(text, encoding="utf-8")
        else:
            sys.stdout.write(text)
