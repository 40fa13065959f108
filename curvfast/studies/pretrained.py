"""Figure 3 on SmolLM2: recitation, arithmetic, facts and logic before and after an edit."""

from __future__ import annotations

from typing import Any

from torch import nn

from curvfast.baselines.svd import svd_basis
from curvfast.demo import smollm
from curvfast.demo.comparison import compare
from curvfast.demo.tasks import few_shot, questions
from curvfast.driver import collect_from
from curvfast.evals.memorization import Passage, memorization
from curvfast.evals.perplexity import perplexity
from curvfast.lab.lm import kept_by_kind
from curvfast.lab.logic import logic
from curvfast.studies.study import Figures, StudyConfig

_KINDS = {
    "addition": "arithmetic",
    "times_table": "arithmetic",
    "closed_book": "closed_book",
    "open_book": "open_book",
    **{task.name: task.kind for task in logic()},
}
_SHOTS = 4
_METHODS = ("kfac", "svd")


def abilities(ask: StudyConfig) -> Figures:
    """Measure every ability of SmolLM2 before and after the edit of its demo.

    Args:
        ask: Seed of the text curvature is measured on and of the questions.

    Returns:
        Figures as in :func:`curvfast.lab.lm.run`, for generated answers only.

    Raises:
        DownloadError: If the model or a text cannot be had.
        CurvfastError: If the model recites nothing of the text searched.
    """
    recipe = smollm.SmolLMRecipe(seed=ask.seed)
    recipe = recipe.quick() if ask.quick else recipe
    subject = smollm.gather(recipe, ask.say)
    model = subject.model
    asked = {
        **questions(subject.tokenizer, recipe.questions, ask.seed),
        **logic_questions(subject.tokenizer, recipe.questions, ask.seed),
    }

    def measure(model: nn.Module) -> dict[str, float]:
        return {
            "memorization": memorization(model, subject.spans).strict,
            "perplexity": perplexity(model, subject.held_out.split(recipe.batch)),
            **{f"{n}.generated": memorization(model, items).strict for n, items in asked.items()},
        }

    ask.say(f"asking the unedited model: {len(subject.spans)} spans, {len(asked)} tasks")
    base = {**measure(model), "kept_fraction": 1.0}
    ask.say(f"measuring curvature of {len(recipe.layers)} layers on speeches, and editing")
    basis = collect_from(
        model, [{"input_ids": part} for part in subject.statistics.split(recipe.batch)],
        layers=list(recipe.layers), tokens=recipe.statistics_tokens, seed=recipe.seed,
    ).eigh()  # fmt: skip
    point = compare(
        model,
        basis,
        svd_basis(model, basis),
        recipe.mass,
        measure,
        seed=recipe.seed,
        methods=_METHODS,
    )
    return {
        "tasks": _KINDS,
        "base": base,
        **{method: point[method] for method in _METHODS},
        "mass": recipe.mass,
        "spans": len(subject.spans),
        "kept": {
            method: {"generated": kept_by_kind(base, point[method], _KINDS, "generated")}
            for method in _METHODS
        },
    }


def logic_questions(tokenizer: Any, count: int, seed: int) -> dict[str, list[Passage]]:
    """Return few-shot questions of each task of logic.

    Args:
        tokenizer: The model's.
        count: Questions of each task.
        seed: Seed of their choice.

    Returns:
        Prompts and answers as token ids, by task.
    """
    found = {}
    for task in logic():
        drawn = [
            (question.prompt, question.answer.removesuffix("."))
            for question in task.ask(count + _SHOTS, seed)
        ]
        found[task.name] = few_shot(tokenizer, drawn, lambda *pair: pair, count)
    return found
