"""Tables of the CPU benchmarks, from the JSON in results/cpu."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Results = Mapping[str, Any]
Lines = list[Sequence[str]]
KINDS = ("products", "attention", "elementwise", "drawing", "copies", "python")


def second_moments(bench: Results) -> Lines:
    """Times faster than ``addmm_``, a column a width."""
    ratios = {race["name"]: race["ratio"] for race in bench["races"]}
    kinds = {
        "fp32": "fp32 rows, against `addmm_`",
        "bf16": "bf16 rows, against a cast and `addmm_`",
    }
    names = [name for name in ratios if name.startswith("test_second_moment[")]
    widths = sorted({int(name.split("[")[1].split("-")[0]) for name in names})
    rows = [
        [label, *(f"{ratios[f'test_second_moment[{d}-{kind}]']:.2f}" for d in widths)]
        for kind, label in kinds.items()
    ]
    return [["d", *map(str, widths)], *rows]


def races(bench: Results) -> Lines:
    """Every other race."""
    lines: Lines = [["", "rival", "times faster", "quartiles"]]
    for race in bench["races"]:
        if not race["name"].startswith("test_second_moment["):
            low, high = race["quartiles"]
            name = race["name"].removeprefix("test_").replace("_", " ")
            spread = f"{low:.2f}–{high:.2f}"
            lines.append([name, race.get("rival", ""), f"{race['ratio']:.2f}", spread])
    return lines


def peers(found: Results, case: str) -> Lines:
    """One row a peer, of those that ran."""
    rows = [row for row in found["cases"][case]["rows"] if row["status"] == "ok"]
    ours = statistics.median(next(row for row in rows if row["peer"] == "ours")["seconds"])
    head = ["", "time, ours = 1", "alive MB", "GFLOP", "MB moved", "error A", "error G"]
    return [
        head,
        *(
            [
                "**curvfast**" if row["peer"] == "ours" else f"{row['peer']} {row['version']}",
                f"{statistics.median(row['seconds']) / ours:.2f}",
                f"{row['live_peak_bytes'] / 1e6:.0f}",
                f"{row['flop_per_batch'] / 1e9:.1f}",
                f"{row['traffic_bytes_per_batch'] / 1e6:.0f}",
                f"{row['error_a']:.1e}",
                f"{row['error_g']:.1e}",
            ]
            for row in rows
        ),
    ]


def scaling(found: Results) -> Lines:
    """One row a curve."""
    head = ["", "sizes", "cost, smallest = 1", "exponent", "theory"]
    return [
        head,
        *(
            [
                curve["name"],
                " ".join(map(str, curve["sizes"])),
                " ".join(f"{cost:.2f}" for cost in curve["relative_cost"]),
                f"{curve['exponent']:.2f}",
                f"{curve['theory']:.0f}",
            ]
            for curve in found["curves"]
        ),
    ]


def shares(found: Results) -> Lines:
    """One row a profile."""
    lines: Lines = [["share of the time", *KINDS, "time, before = 1"]]
    for part in ("collect_from", "edit"):
        before = found["runs"]["before"][part]["seconds"]
        for label, run in found["runs"].items():
            spent = [f"{run[part][kind]:.0%}" for kind in KINDS]
            relative = f"{run[part]['seconds'] / before:.2f}"
            lines.append([f"`{part}`, {label}", *spent, relative])
    return lines


def machine(found: Results) -> str:
    """The machine of the measurements."""
    facts = found["environment"]
    return (
        f"{facts['threads']} threads of {facts['cpu']} ({facts['capability']}), torch "
        f"{facts['torch']}, commit {facts['commit']}"
    )
