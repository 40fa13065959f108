"""``curvfast study``: the paper's figures and tables, measured on models made here."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from curvfast.cli.stages import stage_reporter
from curvfast.display import aligned
from curvfast.experiments.studies.names import NAMES


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "study",
        help="repeat a figure or table of the paper, or go beyond it, over seeds",
        description="Each study trains its models here (cached), measures, and writes a JSON a "
        "seed and a picture to OUT/STUDY. What is there already is not measured again.",
        epilog="studies:\n"
        + "\n".join(f"  {name:<14}{title}" for name, (title, _) in NAMES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", choices=[*NAMES, "all"], metavar="STUDY", help="or all of them")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default 0 1 2"
    )
    parser.add_argument("--out", type=Path, default=Path("studies-out"), help="default studies-out")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of Fashion-MNIST's *-ubyte.gz files"
    )
    parser.add_argument("--again", action="store_true", help="measure what is there already too")
    parser.add_argument(
        "--quick", action="store_true", help="a cut of seconds, to try the pipeline"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from curvfast.experiments.studies.runs import STUDIES, run

    report_stage = stage_reporter(quiet=options.quiet)
    for name in NAMES if options.study == "all" else [options.study]:
        found = run(
            name, options.seeds, options.out, report_stage, quick=options.quick,
            again=options.again, data=options.data,
        )  # fmt: skip
        title, source = NAMES[name]
        print(f"\n{name}: {title}{f' ({source} in kind)' if source else ''}")
        for heading, lines in STUDIES[name].tables(found).items():
            print(f"\n{heading}\n{aligned(lines)}")
    return 0
