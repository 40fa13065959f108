"""``curvfast apply`` and ``curvfast revert``: apply a patch to a checkpoint, and revert it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_to(commands: Any) -> None:
    """Add the commands to the parser."""
    for name, short in (
        ("apply", "edit a checkpoint by a patch that Patch.save wrote"),
        ("revert", "take a patch back: the checkpoint is what it was, bit for bit"),
    ):
        parser = commands.add_parser(
            name,
            help=short,
            description=f"{short[0].upper()}{short[1:]}. Weights that are not those the patch "
            "belongs to are refused before anything is written; other files are copied.",
        )
        parser.add_argument("patch", type=Path, metavar="PATCH", help="the folder of the patch")
        parser.add_argument(
            "--model", type=Path, required=True, metavar="DIR",
            help="a folder that save_pretrained wrote, of safetensors",
        )  # fmt: skip
        parser.add_argument("--out", type=Path, metavar="DIR", help="a new folder (in place)")
        parser.set_defaults(run=_run, revert=name == "revert")


def _run(options: argparse.Namespace) -> int:
    from curvfast.export.patch import Patch
    from curvfast.export.patch_checkpoint import patch_checkpoint

    patch = Patch.load(options.patch)
    patch_checkpoint(patch, options.model, options.out, revert=options.revert)
    if not options.quiet:
        done = "reverted" if options.revert else "patched"
        print(
            f"· {done} {len(patch.layers)} layers: {options.out or options.model}", file=sys.stderr
        )
    return 0
