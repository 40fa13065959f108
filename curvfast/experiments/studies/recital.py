"""Table1Model: the demo's model with its passages by kind and half, and Table 1's measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvfast.analysis import ndcg, stress, top_tokens
from curvfast.evals.memorization import Passage, memorization
from curvfast.evals.perplexity import perplexity
from curvfast.experiments.data.corpus import TokenizedCorpus, load_corpus
from curvfast.experiments.data.texts import bible
from curvfast.experiments.models.language import trained_model
from curvfast.experiments.recipes import Recipe
from curvfast.experiments.runs.demo_lm import prose

KINDS = ("speeches", "bible")
HALVES = ("first", "second")
SCORES = ("strict", "loose", "levenshtein")
_ROWS = 16
_RANKED_WINDOWS = 32
_BIBLE_WINDOWS = 120
# An upper bound of characters per token of the Bible, averaged over a window.
_CHARACTERS_A_TOKEN = 8
_LEFT, _RIGHT, _OFFSETS = (8, 32), (4, 8, 16), (16,)


@dataclass(frozen=True, eq=False)
class Table1Model:
    """A reciting model, and the texts it is measured on."""

    model: Any
    passages: dict[str, list[Passage]]
    """By kind and half: ``speeches_first``, ``speeches_second``, ``bible_first``..."""
    statistics: list[dict[str, Tensor]]
    """Training prose, which holds none of the passages."""
    prose: Sequence[Tensor]
    """Windows of held-out speeches."""
    scripture: Sequence[Tensor]
    """Windows of the Bible, after the part with the passages."""
    ranking: Tensor
    """The unedited model's likeliest tokens on some of ``prose``."""

    def measures(self) -> dict[str, float]:
        """Measure the model in its current state.

        Returns:
            ``KIND_HALF_SCORE`` for each of :data:`SCORES`; ``perplexity`` and
            ``perplexity_bible``; and ``ndcg``, nDCG@10 against the unedited model.
        """
        found: dict[str, float] = {}
        for name, passages in self.passages.items():
            scores = memorization(self.model, passages)
            found |= {f"{name}_{score}": getattr(scores, score) for score in SCORES}
        return {
            **found,
            "perplexity": perplexity(self.model, self.prose),
            "perplexity_bible": perplexity(self.model, self.scripture),
            "ndcg": float(ndcg(self.ranking, _ranking(self.model, self.prose)).mean()),
        }

    def stressed(self) -> dict[str, Any]:
        """Run the stress test: prompts lengthened by other prose, shifted, with offset positions.

        Returns:
            By variant ``recited`` (share of passages to their end) and ``length`` (mean tokens
            before the first mismatch), ``any`` being each passage's best variant; and
            ``offsets_are_void``.
        """
        passages = [passage for own in self.passages.values() for passage in own]
        before = torch.cat(list(self.prose))[:, : max(_LEFT)].tolist()
        report = stress(
            self.model, passages, left=_LEFT, right=_RIGHT, offsets=_OFFSETS,
            contexts=[before[i % len(before)] for i in range(len(passages))],
        )  # fmt: skip
        whole = report.lengths == report.possible
        recited = [*whole.double().mean(0).tolist(), float(whole.any(1).double().mean())]
        lengths = [*report.lengths.double().mean(0).tolist(), float(report.longest.double().mean())]
        variants = {
            name: {"recited": share, "length": length}
            for name, share, length in zip((*report.variants, "any"), recited, lengths, strict=True)
        }
        return {"variants": variants, "offsets_are_void": report.offsets_are_void}


def recital(recipe: Recipe) -> Table1Model:
    """Return the demo's model, trained or loaded, with its texts.

    Args:
        recipe: Sizes and seed.

    Returns:
        The unedited model and its texts.

    Raises:
        DownloadError: If the text cannot be had.
    """
    corpus = load_corpus(recipe)
    model = trained_model(recipe, corpus)
    windows = corpus.held_out.split(_ROWS)
    return Table1Model(
        model=model,
        passages=quarters(corpus.passages()),
        statistics=prose(recipe, corpus),
        prose=windows,
        scripture=scripture(recipe, corpus).split(_ROWS),
        ranking=_ranking(model, windows),
    )


def quarters(passages: Sequence[Passage]) -> dict[str, list[Passage]]:
    """Split passages by kind, speeches before the Bible, and alternately into halves."""
    middle = len(passages) // 2
    kinds = dict(zip(KINDS, (passages[:middle], passages[middle:]), strict=True))
    return {
        f"{kind}_{half}": list(own[start::2])
        for kind, own in kinds.items()
        for start, half in enumerate(HALVES)
    }


def scripture(recipe: Recipe, corpus: TokenizedCorpus) -> Tensor:
    """Return evenly spaced windows of the part of the Bible without passages.

    Args:
        recipe: Extent of the Bible used for passages, and tokens of a window.
        corpus: Source of the tokenizer.

    Returns:
        int64 [windows, length]; a window is left out where the text ends before it does.
    """
    rest = bible()[recipe.bible_characters :]
    starts = [i * len(rest) // _BIBLE_WINDOWS for i in range(_BIBLE_WINDOWS)]
    parts = [rest[start:][: _CHARACTERS_A_TOKEN * recipe.length] for start in starts]
    encoded = corpus.tokenizer(parts, add_special_tokens=False)["input_ids"]
    whole = [ids[: recipe.length] for ids in encoded if len(ids) >= recipe.length]
    return torch.tensor(whole)


def _ranking(model: Any, windows: Sequence[Tensor]) -> Tensor:
    return top_tokens(model, windows[: _RANKED_WINDOWS // _ROWS])
