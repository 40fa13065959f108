"""save_edited(): a checkpoint of an edited model, with a section on the edit in its model card."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from curvfast._version import __version__
from curvfast.editing.report import EditReport
from curvfast.errors import BasisMismatch, InputError, StorageError
from curvfast.export.factored import factored_layers
from curvfast.model.identity import whole_model
from curvfast.model.layers import linear_layers
from curvfast.storage import FORMAT_VERSION, write_json, write_text

_BEGIN, _END = "<!-- curvfast -->", "<!-- /curvfast -->"
_SECTION = """\
## Edited with curvfast

{what}: {share:.2%} of all.

{layers}
{perplexity}
Measured with {facts}. Everything is in `curvfast.json`; to make the edit again:

```python
import curvfast
from transformers import {loader}

model = {loader}.from_pretrained({source})
basis = curvfast.Eigenbasis.from_pretrained("basis")  # of the curvature told above
curvfast.edit(
    model,
    basis,
{arguments}
)
```
"""
_BY_CURVATURE = """\
K-FAC weight editing ([arXiv 2510.24256](https://arxiv.org/abs/2510.24256)): in {count} weight
matrices the directions of low curvature, where text memorized verbatim lives, were {done}; those of
high curvature, which many texts share, are as they were"""
_OTHERWISE = """\
Weights edited as in [arXiv 2510.24256](https://arxiv.org/abs/2510.24256): in {count} weight
matrices what {choice} leaves out was {done}; what it keeps is as it was"""


def save_edited(
    model: Any,
    report: EditReport,
    directory: str | PathLike[str],
    tokenizer: Any = None,
    *,
    perplexity: Mapping[str, float] | None = None,
) -> None:
    """Write an edited model as a checkpoint for ``from_pretrained``, and document the edit.

    Also written are ``curvfast.json``, the report with its provenance, and in ``README.md`` a
    section "Edited with curvfast"; of an existing README only such a section is replaced. To be
    called on one process.

    Args:
        model: An edited model of transformers.
        report: The report that :func:`curvfast.edit` returned.
        directory: Made if missing.
        tokenizer: Saved as well, if given.
        perplexity: Perplexities to document, by name: ``{"unedited": 35.4, "edited": 44.4}``.

    Raises:
        InputError: If the model is not of transformers, wrapped by PEFT, sharded, or has factored
            layers.
        BasisMismatch: If the report is of another model.
        StorageError: If an existing README has one marker of a section without the other, or a file
            cannot be written.
    """
    inner = whole_model(model)
    if factored_layers(inner):
        raise InputError("the model has factored layers: write it by curvfast.save_factored")
    there = linear_layers(inner)
    missing = [entry.name for entry in report.layers if entry.name not in there]
    if missing:
        raise BasisMismatch(
            f"the report tells of layer {missing[0]!r}, which this {type(inner).__name__} lacks: "
            "pass the report that curvfast.edit returned for this model"
        )
    folder = Path(directory)
    card = folder / "README.md"
    try:
        text = card.read_bytes().decode() if card.exists() else ""
        text = with_section(text, edit_section(report, perplexity))
        inner.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_text(card, text)
        write_json(folder / "curvfast.json", _facts(report, perplexity))
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"could not write a checkpoint to {str(folder)!r}: {error}") from error


def edit_section(report: EditReport, perplexity: Mapping[str, float] | None = None) -> str:
    """Return the model card's section on an edit, in Markdown."""
    provenance = report.provenance
    rows = [
        (f"`{e.name}`", *map(_percent, (e.mass, e.fraction, e.relative_change)))
        for e in report.layers
    ]
    told = [(key, f"{value:.2f}") for key, value in (perplexity or {}).items()]
    model = provenance.get("model", {})
    kind = str(model.get("class", ""))
    return _SECTION.format(
        what=_what(report),
        share=report.kept_fraction,
        layers=_table(("layer", "mass kept", "eigenpairs kept", "relative change"), rows),
        perplexity=_table(("", "perplexity"), told) if told else "",
        facts=_scalars(provenance.get("factors", {})) or "factors of unknown origin",
        loader="AutoModelForCausalLM" if kind.endswith("ForCausalLM") else (kind or "AutoModel"),
        source=repr(model.get("name") or "the unedited model").replace("'", '"'),
        arguments="\n".join(f"    {line}" for line in _arguments(report)),
    )


def with_section(text: str, section: str) -> str:
    """Return a model card with the section, which replaces an earlier one or is appended.

    Raises:
        StorageError: If one marker is there without the other.
    """
    marked = f"{_BEGIN}\n{section}{_END}"
    found = re.findall(f"{_BEGIN}|{_END}", text)
    if not found:
        gap = "" if not text else "\n" if text.endswith("\n") else "\n\n"
        return f"{text}{gap}{marked}\n"
    if found != [_BEGIN, _END]:
        raise StorageError(
            f"README.md there does not have {_BEGIN} once and {_END} once after it: mend it, or "
            "remove both, and the section is added at the end"
        )
    before, rest = text.split(_BEGIN)
    return before + marked + rest.split(_END)[1]


def _facts(report: EditReport, perplexity: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Return the contents of ``curvfast.json``."""
    head = {"kind": "curvfast-edit", "format_version": FORMAT_VERSION}
    told = {} if perplexity is None else {"perplexity": dict(perplexity)}
    return {**head, "curvfast_version": __version__, **report.to_dict(), **told}


def _what(report: EditReport) -> str:
    """Return a sentence on the edit; it names curvature only if that determined the selection."""
    rule, strength = report.provenance.get("rule", {}), report.strength
    importance = rule.get("importance", "kfac")
    known = importance == "kfac" and "selection" not in rule
    return (_BY_CURVATURE if known else _OTHERWISE).format(
        count=len(report.layers),
        done="removed" if strength == 1 else f"scaled by {1 - strength:g}",
        choice="a given selection" if "selection" in rule else f"the importance `{importance}`",
    )


def _arguments(report: EditReport) -> list[str]:
    rule = report.provenance.get("rule", {})
    given = {"selection": "kept", "corrections": "corrections"}
    chosen = [f"{k}={given.get(k, repr(v))}," for k, v in rule.items()]
    names = [f'    "{entry.name}",' for entry in report.layers]
    strength = [] if report.strength == 1 else [f"strength={report.strength!r},"]
    return [*chosen, "layers=[", *names, "],", *strength]


def _percent(share: float) -> str:
    return "not known" if math.isnan(share) else f"{share:.2%}"


def _scalars(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}: {v}" for k, v in facts.items() if isinstance(v, str | int | float))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
