"""``curvfast demo``: the edit of a model that recites passages of real text."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curvfast.cli.stages import stage_reporter
from curvfast.display import aligned

_METHODS = (
    ("base", "unedited"),
    ("kfac", "K-FAC edit"),
    ("svd", "truncated SVD"),
    ("random", "random pairs"),
)
_COLUMNS = (
    ("strict", "recited", "{:.1%}"),
    ("loose", "nearly", "{:.1%}"),
    ("levenshtein", "distance", "{:.3f}"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("closed_book", "closed book", "{:.1%}"),
    ("open_book", "open book", "{:.1%}"),
    ("addition", "addition", "{:.1%}"),
    ("times_table", "times table", "{:.1%}"),
    ("kept_fraction", "kept", "{:.1%}"),
)


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "demo",
        help="train or fetch a model that recites, edit it, and measure what it still recites",
        description="lm: a small Llama trained here on speeches until it recites passages. "
        "smollm: SmolLM2-135M, and passages of the Bible it recites. Models and texts are cached.",
    )
    parser.add_argument("model", nargs="?", choices=("lm", "smollm"), default="lm")
    parser.add_argument("--out", type=Path, help="folder for results.json, picture and checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (0)")
    parser.add_argument(
        "--quick", action="store_true", help="a cut of seconds, to try the pipeline"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    report_stage = stage_reporter(quiet=options.quiet)
    command = f"curvfast demo{' smollm' * (options.model == 'smollm')} --seed {options.seed}"
    command += " --quick" * options.quick
    if options.model == "smollm":
        from curvfast.experiments.runs import demo_smollm

        sizes = demo_smollm.SmolLMRecipe(seed=options.seed)
        sizes = sizes.quick() if options.quick else sizes
        results = demo_smollm.run(sizes, options.out, report_stage, command=command)
    else:
        from curvfast.experiments.recipes import Recipe
        from curvfast.experiments.runs import demo_lm

        recipe = Recipe(seed=options.seed)
        recipe = recipe.quick() if options.quick else recipe
        results = demo_lm.run(recipe, options.out, report_stage, command=command)
    print(_table(results))
    return 0


def _table(results: Mapping[str, Any]) -> str:
    """Return the figures of each method as an aligned table."""
    rows = [(label, results[key]) for key, label in _METHODS if key in results]
    columns = [column for column in _COLUMNS if column[0] in rows[0][1]]
    lines = [["", *(heading for _, heading, _ in columns)]]
    lines += [
        [label, *(form.format(figures[key]) if key in figures else "" for key, _, form in columns)]
        for label, figures in rows
    ]
    return aligned(lines)
