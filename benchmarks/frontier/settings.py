"""Settings of the comparison: a model, its recited passages in two halves, and clean text."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from curvfast import Corrections, collect_from, correct
from curvfast.baselines.curvature_free import svd_basis
from curvfast.evals.memorization import Passage, memorization
from curvfast.evals.perplexity import perplexity
from curvfast.experiments.data.corpus import load_corpus
from curvfast.experiments.models.language import trained_model
from curvfast.experiments.recipes import Recipe
from curvfast.experiments.runs import demo_lm, demo_smollm
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.model.layers import LayerSpec

Result = TypeVar("Result")
Batches = list[dict[str, Tensor]]
_ROWS = 16


@dataclasses.dataclass(eq=False)
class Setting:
    """A setting: a reciting model, and the texts for changing and measuring it."""

    name: str
    seed: int
    facts: dict[str, Any]
    """The facts that the figures depend on, JSON-able."""
    model: nn.Module
    layers: LayerSpec
    """The layers that may change."""
    seen: Sequence[Passage]
    """Passages that supervised methods are given to forget."""
    unseen: Sequence[Passage]
    """Passages that no method is given."""
    text: Sequence[Tensor]
    """Windows for perplexity, of documents not used for training or curvature."""
    statistics: Batches
    """Text for measuring curvature, without the passages."""
    tokens: int
    """Number of its counted positions."""
    clean: Batches
    """The part of it that supervised methods are given to retain."""

    def __post_init__(self) -> None:
        self.spent: dict[str, float] = {}
        """CPU seconds of each preparation."""

    @cached_property
    def basis(self) -> Eigenbasis:
        """The eigenbasis of curvature."""
        return self._prepared("basis", self._basis)

    @cached_property
    def corrections(self) -> Corrections:
        """Λ in that eigenbasis."""
        basis = self.basis
        return self._prepared("corrections", lambda: self._corrections(basis))

    @cached_property
    def singular(self) -> Eigenbasis:
        """The singular vectors."""
        # Names of layers are all it takes of the basis.
        names = list(self.basis)
        return self._prepared("singular", lambda: svd_basis(self.model, names))

    def measures(self) -> dict[str, float]:
        """Return recitation of both halves, and perplexity."""
        found = {}
        for half, passages in (("seen", self.seen), ("unseen", self.unseen)):
            scores = memorization(self.model, passages)
            for measure in ("strict", "loose", "levenshtein"):
                found[f"{measure}_{half}"] = getattr(scores, measure)
        return {**found, "perplexity": perplexity(self.model, self.text)}

    def _basis(self) -> Eigenbasis:
        return collect_from(
            self.model, self.statistics, layers=self.layers, labels="sampled",
            tokens=self.tokens, seed=self.seed, progress=False,
        ).eigh()  # fmt: skip

    def _corrections(self, basis: Eigenbasis) -> Corrections:
        return correct(
            self.model, basis, self.statistics, labels="sampled", tokens=self.tokens,
            seed=self.seed, progress=False,
        )  # fmt: skip

    def _prepared(self, what: str, make: Callable[[], Result]) -> Result:
        started = time.process_time()
        made = make()
        self.spent[what] = time.process_time() - started
        return made


def trained(seed: int, quick: bool) -> Setting:
    """The demo's Llama and the 64 passages planted in it."""
    recipe = Recipe(seed=seed)
    recipe = recipe.quick() if quick else recipe
    corpus = load_corpus(recipe)
    statistics = demo_lm.prose(recipe, corpus)
    seen, unseen = halves(corpus.passages())
    return Setting(
        name="lm",
        seed=seed,
        facts=dataclasses.asdict(recipe),
        model=trained_model(recipe, corpus),
        layers="mlp",
        seen=seen,
        unseen=unseen,
        text=corpus.held_out.split(_ROWS),
        statistics=statistics,
        tokens=recipe.statistics_tokens,
        clean=statistics[:8],
    )


def pretrained(seed: int, quick: bool) -> Setting:
    """SmolLM2-135M and the spans it recites of the King James Bible."""
    plan = demo_smollm.Plan(seed=seed)
    plan = plan.quick() if quick else plan
    subject = demo_smollm.gather(plan, lambda line: print(line, file=sys.stderr, flush=True))
    seen, unseen = halves(subject.spans)
    rows = [{"input_ids": part} for part in subject.statistics.split(plan.batch)]
    return Setting(
        name="smollm",
        seed=seed,
        facts=dataclasses.asdict(plan),
        model=subject.model.eval(),
        layers=list(plan.layers),
        seen=seen,
        unseen=unseen,
        text=subject.held_out.split(plan.batch),
        statistics=rows,
        tokens=plan.statistics_tokens,
        clean=[{"input_ids": subject.statistics[:8, :128]}],
    )


def halves(passages: Sequence[Passage]) -> tuple[list[Passage], list[Passage]]:
    """Split passages alternately, so that both halves are from all sources."""
    return list(passages[::2]), list(passages[1::2])


SETTINGS: dict[str, Callable[[int, bool], Setting]] = {"lm": trained, "smollm": pretrained}


@torch.no_grad()
def restore(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Restore weights."""
    for name, value in model.state_dict().items():
        value.copy_(state[name])
