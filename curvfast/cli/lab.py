"""``curvfast lab``: small experiments on what an edit removes and what it keeps."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from curvfast.cli.stages import stage_reporter
from curvfast.display import aligned

_METHODS = {
    "base": "unedited",
    "kfac": "K-FAC edit",
    "svd": "truncated SVD",
    "random": "random pairs",
}
_PICTURES = {
    "memorized": "wrong kept",
    "ground_truth": "their truth",
    "validation": "validation",
    "clean": "right kept",
    "kept_fraction": "pairs kept",
}


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "lab", help="experiments in small: wrong labels learnt by heart, tasks before and after"
    )
    experiments = parser.add_subparsers(dest="experiment", required=True, metavar="EXPERIMENT")
    vit = experiments.add_parser(
        "vit",
        help="a vision transformer trained on wrong labels forgets them",
        description="mnist: 5,000 digits, by pip. fashion: Fashion-MNIST from files you have. "
        "overfit: the same, trained to zero loss, where statistics of training pictures fail. "
        "Trained models are cached.",
    )
    vit.add_argument("recipe", nargs="?", choices=("mnist", "fashion", "overfit"), default="mnist")
    vit.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of Fashion-MNIST's *-ubyte.gz files"
    )
    vit.add_argument(
        "--blocks", type=int, nargs="+", metavar="N", help="blocks whose fc1 and fc2 are edited"
    )
    vit.add_argument("--noise", type=float, metavar="SHARE", help="of labels that are wrong")
    _common(vit)
    vit.set_defaults(run=_vit)
    lm = experiments.add_parser(
        "lm",
        help="a language model answers questions before and after an edit",
        description="A small Llama trained here on prose, passages to recite, made-up facts, "
        "arithmetic and logic; then what an edit leaves of each. Trained models are cached.",
    )
    lm.add_argument(
        "--lessons", type=float, metavar="SHARE",
        help="of lessons in the text curvature is measured on",
    )  # fmt: skip
    lm.add_argument(
        "--blocks", type=int, nargs="+", metavar="N", help="blocks whose MLPs are edited"
    )
    _common(lm)
    lm.set_defaults(run=_lm)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mass", type=float, metavar="ρ", help="of the edit that is reported")
    parser.add_argument("--out", type=Path, help="folder for results.json and pictures")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (0)")
    parser.add_argument(
        "--quick", action="store_true", help="a cut of seconds, to try the pipeline"
    )


def _vit(options: argparse.Namespace) -> int:
    from curvfast.experiments.recipes import RECIPES, Statistics
    from curvfast.experiments.runs import lab_vit

    recipe = replace(RECIPES[options.recipe], seed=options.seed)
    recipe = recipe.quick() if options.quick else recipe
    recipe = replace(recipe, **_asked(options, "noise"))
    command = _command(options, f"vit {options.recipe}", "data", "noise")
    results = lab_vit.run(
        recipe, options.out, stage_reporter(quiet=options.quiet), data=options.data, command=command
    )
    print(_table(_methods(results), _PICTURES))
    print("\ncurvature measured on (pictures, tokens, labels), the same number of pairs kept")
    arms = [(str(Statistics(**arm["statistics"])), arm["matched"]) for arm in results["statistics"]]
    print(_table(arms, _PICTURES))
    print(f"\nblocks edited, ρ = {results['mass']:g}")
    print(_table(_blocks(results), _PICTURES))
    return 0


def _lm(options: argparse.Namespace) -> int:
    from curvfast.experiments.recipes import LmRecipe
    from curvfast.experiments.runs import lab_lm

    recipe = LmRecipe().seeded(options.seed)
    recipe = recipe.quick() if options.quick else recipe
    recipe = replace(recipe, **_asked(options))
    if options.lessons is not None:
        recipe = replace(recipe, statistics_lessons=options.lessons)
    command = _command(options, "lm", "lessons")
    results = lab_lm.run(recipe, options.out, stage_reporter(quiet=options.quiet), command=command)
    figures = dict(_methods(results))
    rows = [
        ["passages recited", *(f"{found['memorization']:.1%}" for found in figures.values())],
        ["perplexity", *(f"{found['perplexity']:.2f}" for found in figures.values())],
    ]
    for name in results["tasks"]:
        rows.append([name, *(_answers(found, name) for found in figures.values())])
    rows.append(["pairs kept", *(f"{found['kept_fraction']:.1%}" for found in figures.values())])
    print(aligned([["answers generated / chosen", *figures], *rows]))
    print(f"\naccuracy after / before, ρ = {results['mass']:g}")
    kept = [
        (f"{_METHODS[method]}, {how}", shares)
        for method, ways in results["kept"].items()
        for how, shares in ways.items()
    ]
    print(_table(kept, {kind: kind.replace("_", " ") for kind in kept[0][1]}))
    return 0


def _answers(figures: Mapping[str, float], task: str) -> str:
    return f"{figures[f'{task}.generated']:.0%} / {figures[f'{task}.chosen']:.0%}"


def _asked(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the fields of a recipe that are set by options."""
    found = {name: getattr(options, name) for name in ("mass", *names)}
    found["blocks"] = options.blocks and tuple(options.blocks)
    return {name: value for name, value in found.items() if value is not None}


def _command(options: argparse.Namespace, experiment: str, *names: str) -> str:
    """Return the command that reproduces the results."""
    words = ["curvfast", "lab", *experiment.split(), "--seed", str(options.seed)]
    for name in (*names, "mass", "blocks"):
        value = getattr(options, name)
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words + ["--quick"] * options.quick)


def _methods(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    return [(label, results[key]) for key, label in _METHODS.items() if key in results]


def _blocks(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    return [
        (f"{', '.join(map(str, part['blocks']))} {method}", point[key])
        for part in results["blocks"]
        for point in part["sweep"]
        if point["mass"] == results["mass"]
        for key, method in (("kfac", "K-FAC"), ("svd", "SVD"))
    ]


def _table(rows: Sequence[tuple[str, Mapping[str, float]]], columns: Mapping[str, str]) -> str:
    """Return shares in percent as an aligned table."""
    lines = [["", *columns.values()]]
    lines += [[label, *(f"{figures[key]:.1%}" for key in columns)] for label, figures in rows]
    return aligned(lines)
