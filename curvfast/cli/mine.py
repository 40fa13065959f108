"""``curvfast mine``: search a corpus for passages that a model recites."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

_SHOWN = 5


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "mine",
        help="find the passages of a corpus that a model recites",
        description="Cuts texts into windows and lists those whose suffix the model predicts token "
        "by token, all before it given: what greedy decoding would recite.",
    )
    parser.add_argument("model", help="a folder with a causal language model, or a hub id")
    parser.add_argument("texts", nargs="+", help="text or JSON-lines files, or globs of them")
    parser.add_argument("--prefix", type=int, default=64, help="tokens of the prompt (64)")
    parser.add_argument("--suffix", type=int, default=48, help="tokens that must follow (48)")
    parser.add_argument("--field", default="text", help="where JSON lines hold their text (text)")
    parser.add_argument(
        "--split", default="file", choices=("file", "block", "line"),
        help="what a document of a text file is (file)",
    )  # fmt: skip
    parser.add_argument("--bos", action="store_true", help="begin each prompt with the model's BOS")
    parser.add_argument(
        "--copies", action="store_true", help="list suffixes that repeat their prompt, too"
    )
    parser.add_argument("--batch", type=int, default=32, help="windows a batch (32)")
    parser.add_argument("--dtype", default="float32", help="of the weights (float32)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--out", type=Path, help="a JSON file for every passage, ids and text")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from curvfast.data import text_batches
    from curvfast.errors import InputError
    from curvfast.evals.mining import mine
    from curvfast.evals.passages import MINED, MINED_VERSION
    from curvfast.hf.loading import load_causal_lm
    from curvfast.storage import write_json

    span = options.prefix + options.suffix
    if min(options.prefix, options.suffix) < 1:
        raise InputError("--prefix and --suffix must be at least 1")
    model, tokenizer = load_causal_lm(options.model, dtype=options.dtype, device=options.device)
    if options.bos and tokenizer.bos_token_id is None:
        raise InputError(f"--bos: the tokenizer of {options.model!r} has no BOS; leave it out")
    # Documents are kept separate, so that no window holds tokens of two.
    batches = text_batches(
        options.texts, tokenizer, seq_len=span, batch_size=options.batch, shuffle_buffer=0,
        boundaries="separate", field=options.field, split=options.split, drop_last=True,
    )  # fmt: skip
    report = mine(
        model, batches, prefix=options.prefix, suffix=options.suffix, copies=options.copies,
        opening=(tokenizer.bos_token_id,) if options.bos else (), batch_size=options.batch,
        progress=not options.quiet,
    )  # fmt: skip
    found = [
        {
            "prefix": list(mined.passage.prefix),
            "suffix": list(mined.passage.suffix),
            "prefix_text": tokenizer.decode(mined.passage.prefix),
            "suffix_text": tokenizer.decode(mined.passage.suffix),
            "occurrences": mined.occurrences,
        }
        for mined in report.found
    ]
    print(report)
    for entry in found[:_SHOWN]:
        print(
            f"  {entry['occurrences']}× …{entry['prefix_text'][-40:]!r} → {entry['suffix_text']!r}"
        )
    if len(found) > _SHOWN:
        print(f"  and {len(found) - _SHOWN} more")
    if options.out is not None:
        counts = {k: getattr(report, k) for k in ("windows", "distinct", "copies", "forwarded")}
        write_json(
            options.out,
            {
                "kind": MINED, "format_version": MINED_VERSION, "model": options.model,
                "prefix": options.prefix, "suffix": options.suffix, **counts, "passages": found,
            },
        )  # fmt: skip
        if not options.quiet:
            print(f"· wrote {options.out}", file=sys.stderr)
    return 0
