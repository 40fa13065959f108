"""``curvfast env``: versions and backends, for bug reports."""

from __future__ import annotations

import argparse
from typing import Any


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("env", help="print versions, for bug reports")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    import platform

    import torch

    from curvfast import ops
    from curvfast.model.identity import versions

    facts = {
        **versions(),
        "platform": platform.platform(),
        "torch threads": torch.get_num_threads(),
        "native core": ops.backends()["native"],
        **{f"backend {name}": status for name, status in ops.backends().items()},
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    width = max(map(len, facts))
    for key, value in facts.items():
        print(f"{key:<{width}}  {value}")
    return 0
