"""``curvfast evaluate``: a model before and after patches, in one table."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curvfast.display import aligned
from curvfast.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from curvfast.evals.comparison import Change, Score
    from curvfast.evals.lm_eval import Harness
    from curvfast.evals.memorization import Passage
    from curvfast.export.patch import Patch

_SEQ_LEN = 512


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "evaluate",
        help="measure a model before and after patches: perplexity, recitation, tasks",
        description="Patches are applied in memory, one after another, and taken back; the "
        "checkpoint is not written. Without one the model is measured as it is.",
    )
    parser.add_argument("model", help="a folder with a causal language model, or a hub id")
    parser.add_argument(
        "--patch", type=Path, nargs="+", action="extend", default=[], metavar="PATCH",
        help="folders that Patch.save wrote",
    )  # fmt: skip
    parser.add_argument(
        "--strength", type=float, metavar="α",
        help="of W + α (W' − W), W' being as the patches make it; below 0 amplifies (1)",
    )  # fmt: skip
    parser.add_argument("--text", metavar="FILE", help="text or JSON lines, for perplexity")
    parser.add_argument(
        "--passages", type=Path, metavar="FILE",
        help="what curvfast mine wrote, JSON lines, or a passage a line: are they recited?",
    )  # fmt: skip
    parser.add_argument("--prefix", type=int, help="tokens of the prompt, of passages (64)")
    parser.add_argument("--suffix", type=int, help="tokens that must follow (48)")
    parser.add_argument(
        "--seq-len", type=int, help="tokens a sequence, of --text (512, or the model's context)"
    )
    parser.add_argument("--field", default="text", help="where JSON lines hold their text (text)")
    parser.add_argument(
        "--bos", action="store_true", help="begin sequences of --text and prompts with BOS"
    )
    parser.add_argument(
        "--lm-eval", metavar="TASKS",
        help="tasks of lm-evaluation-harness, with commas between (pip install curvfast[lm-eval])",
    )  # fmt: skip
    parser.add_argument(
        "--lm-eval-include", type=Path, metavar="DIR", help="YAML files of tasks of your own"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="questions of each task (all)")
    parser.add_argument("--batch", type=int, default=8, help="sequences at a time (8)")
    parser.add_argument("--dtype", help="of the weights (the patch's, else float32)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for evaluation.json and evaluation.txt"
    )
    parser.set_defaults(run=_run)


@dataclass(frozen=True, eq=False)
class _Measures:
    """The requested measures with their data, read once and the same for both models."""

    tokenizer: Any
    text: list[Any] | None
    text_facts: dict[str, Any] | None
    passages: list[Passage] | None
    harness: Harness | None
    limit: int | None
    batch: int

    def of(self, model: nn.Module) -> list[Score]:
        """Return the scores of a model on every measure."""
        from curvfast.evals.comparison import Score
        from curvfast.evals.memorization import memorization
        from curvfast.evals.perplexity import perplexity

        found = []
        if self.text is not None:
            found.append(Score("text", "perplexity", perplexity(model, self.text)))
        if self.passages is not None:
            recited = memorization(model, self.passages, batch_size=self.batch)
            for metric in ("strict", "loose", "levenshtein"):
                found.append(Score("passages", metric, getattr(recited, metric)))
        if self.harness is not None:
            found += self.harness.scores(
                model, self.tokenizer, limit=self.limit, batch_size=self.batch
            )
        return found


def _run(options: argparse.Namespace) -> int:
    from curvfast.evals.comparison import changes, table_of
    from curvfast.evals.lm_eval import find_tasks
    from curvfast.export.patch import Patch, patched
    from curvfast.hf.loading import load_causal_lm

    _check(options)
    if logging.getLogger().getEffectiveLevel() > logging.INFO:
        # The harness warns of every setting that a task leaves at its default.
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
    patches = [Patch.load(folder) for folder in options.patch]
    harness = (
        None
        if options.lm_eval is None
        else find_tasks(options.lm_eval, include=options.lm_eval_include)
    )
    dtype = options.dtype or _dtype_of(patches)
    model, tokenizer = load_causal_lm(options.model, dtype=dtype, device=options.device)
    measures = _read(options, model, tokenizer, harness)
    after = None
    if patches:
        # First, so that a patch that does not fit raises before anything is measured.
        with patched(model, patches, strength=_strength(options)):
            after = measures.of(model)
    compared = changes(measures.of(model), after)
    table = aligned(table_of(compared))
    print(table)
    if options.out is not None:
        _write(options, compared, table, measures, dtype)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raise for contradictory options, before anything is read."""
    if options.text is None and options.passages is None and options.lm_eval is None:
        raise InputError(
            "nothing to measure: pass --text FILE, --passages FILE, --lm-eval TASKS, or several"
        )
    needed = {
        "--strength": (options.strength, "--patch", options.patch),
        "--prefix": (options.prefix, "--passages", options.passages),
        "--suffix": (options.suffix, "--passages", options.passages),
        "--seq-len": (options.seq_len, "--text", options.text),
        "--lm-eval-include": (options.lm_eval_include, "--lm-eval", options.lm_eval),
        "--limit": (options.limit, "--lm-eval", options.lm_eval),
    }
    for name, (given, other, there) in needed.items():
        if given is not None and not there:
            raise InputError(f"{name} is of {other}, which is not given: pass both, or neither")
    if options.strength is not None and not math.isfinite(options.strength):
        raise InputError(f"--strength {options.strength}: pass a number, such as 1 or 0.5")
    if options.batch < 1 or (options.limit is not None and options.limit < 1):
        raise InputError("--batch and --limit must be at least 1")
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        raise InputError(f"--out {str(options.out)!r} is a file; pass a folder")


def _read(
    options: argparse.Namespace, model: Any, tokenizer: Any, harness: Harness | None
) -> _Measures:
    from curvfast.data import text_batches
    from curvfast.evals.passages import read_passages

    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    text = facts = passages = None
    if options.text is not None:
        fitting = int(min(_SEQ_LEN, context))
        seq_len = fitting if options.seq_len is None else options.seq_len
        if seq_len > context:
            raise InputError(f"--seq-len {seq_len}: the model has {context} positions")
        batches = text_batches(
            options.text, tokenizer, seq_len=seq_len, batch_size=options.batch, shuffle_buffer=0,
            field=options.field, bos=options.bos,
        )  # fmt: skip
        text, facts = list(batches), batches.provenance()
    if options.passages is not None:
        passages = read_passages(
            options.passages, tokenizer, prefix=options.prefix, suffix=options.suffix,
            bos=options.bos, field=options.field,
        )  # fmt: skip
        longest = max(len(passage.prefix) + len(passage.suffix) for passage in passages)
        if longest > context:
            raise InputError(
                f"a passage takes {longest} tokens, and the model has {context} positions: pass a "
                "smaller --prefix or --suffix"
            )
    return _Measures(tokenizer, text, facts, passages, harness, options.limit, options.batch)


def _dtype_of(patches: Sequence[Patch]) -> str:
    """Return the dtype of the patches; a model of any other dtype would not match."""
    found = (layer.before.dtype for patch in patches for layer in patch.layers.values())
    return next(found, "float32")


def _strength(options: argparse.Namespace) -> float:
    return 1.0 if options.strength is None else options.strength


def _write(
    options: argparse.Namespace,
    compared: Sequence[Change],
    table: str,
    measures: _Measures,
    dtype: str,
) -> None:
    from curvfast.data.reading import file_facts
    from curvfast.model.identity import versions
    from curvfast.storage import write_json, write_text

    passages, harness = measures.passages, measures.harness
    result = {
        "kind": "curvfast-evaluation", "format_version": 1, "model": options.model,
        "patches": [path.as_posix() for path in options.patch],
        "strength": _strength(options) if options.patch else None,
        "dtype": dtype,
        "scores": [change.to_dict() for change in compared],
        "text": measures.text_facts,
        "passages": passages and {
            **file_facts(options.passages), "count": len(passages),
            "prefix": options.prefix, "suffix": options.suffix, "bos": options.bos,
        },
        "tasks": harness and {"names": list(harness.tasks), "limit": options.limit},
        "versions": versions() | ({"lm_eval": harness.version} if harness else {}),
    }  # fmt: skip
    write_json(options.out / "evaluation.json", result)
    write_text(options.out / "evaluation.txt", table + "\n")
    if not options.quiet:
        print(f"· wrote evaluation.json and evaluation.txt to {options.out}", file=sys.stderr)
