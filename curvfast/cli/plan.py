"""``curvfast plan``: memory, passes and FLOPs of a collection, from a config alone."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "plan",
        help="tell what collecting a model's factors will take: memory, passes, FLOPs",
        description="Rehearses one batch on shapes alone: nothing is allocated or downloaded. "
        "Memory is that of tensors; a GPU's context comes on top.",
    )
    parser.add_argument("model", help="a built-in name, a folder with a config.json, or that file")
    parser.add_argument(
        "--layers", nargs="+", default=["mlp"], metavar="WHICH",
        help="mlp, attention, all, or globs on names (mlp)",
    )  # fmt: skip
    parser.add_argument("--tokens", default="1M", help="labels to count, such as 250k (1M)")
    parser.add_argument("--batch", type=int, default=8, help="sequences or images a batch (8)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens a sequence (512)")
    parser.add_argument(
        "--world-size", type=int, default=1, metavar="N",
        help="devices; they share the layers where one cannot hold all (1)",
    )  # fmt: skip
    parser.add_argument(
        "--device-memory", metavar="SIZE", help="of a device, such as 141GB or 80GiB"
    )
    parser.add_argument("--flops", metavar="RATE", help="FLOP/s a device reaches, such as 400T")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights (bfloat16)")
    parser.add_argument("--device", default="cuda", help="cuda or cpu; it need not be here (cuda)")
    parser.add_argument("--json", action="store_true", help="every figure, as JSON")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from curvfast.planning import plan_collection

    plan = plan_collection(
        options.model,
        options.layers[0] if len(options.layers) == 1 else options.layers,
        tokens=options.tokens,
        batch=options.batch,
        seq_len=options.seq_len,
        world_size=options.world_size,
        device_memory=options.device_memory,
        flops=options.flops,
        dtype=options.dtype,
        device=options.device,
    )
    print(json.dumps(plan.to_dict(), indent=2) if options.json else plan)
    return 0
