"""The label-free detector on memorized passages and unseen windows of the same texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from curvfast.analysis import (
    TextScores,
    auc,
    discriminative_layers,
    memorization_scores,
    token_scores,
)
from curvfast.experiments.studies.figure2 import short
from curvfast.experiments.studies.study import (
    Figures,
    Lines,
    MatplotlibFigure,
    Study,
    StudyConfig,
    spread,
    to_four_decimals,
)
from curvfast.experiments.studies.subjects import ROWS, RecitingModel, demo_lm, lab_lm
from curvfast.report.style import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_COLOURS = ("#0b6e4f", "#3a7ca5")
_GROUND = "#d64541"
_COLUMNS, _LINES = 56, 5


@dataclass(frozen=True)
class Passages:
    """A text with a score for each token."""

    pieces: Sequence[str]
    scores: Sequence[float]


def telling(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], texts: Mapping[str, Passages]
) -> Figure:
    """Draw the AUC of each layer, and texts whose background is redder for flatter tokens.

    Args:
        curves: For each model its figures, one a seed: ``layers`` and ``chosen``.
        texts: What is shown below; all share one scale of colour.

    Returns:
        A panel a model, a thin line a seed, over a panel a text.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.4), layout="constrained", dpi=160)
    halves = figure.subfigures(2, 1, height_ratios=(2, 1), squeeze=False)[:, 0]
    panels = halves[0].subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axes, colour, (label, runs) in zip(panels, _COLOURS, curves.items(), strict=False):
        _layers(axes, runs, colour)
        chosen = mean(run["chosen"] for run in runs)
        axes.set_title(
            f"{label}: AUC {chosen:.3f} on passages not used to choose the layer", loc="left",
            fontsize=9,
        )  # fmt: skip
    panels[0].set_ylabel("AUC, all passages")
    every = [score for text in texts.values() for score in text.scores]
    grid = halves[1].subplots(1, len(texts), squeeze=False)[0]
    for axes, (label, text) in zip(grid, texts.items(), strict=True):
        _text(axes, text, min(every), max(every))
        axes.set_title(label, loc="left", fontsize=9)
    return figure


def _layers(axes: Axes, runs: Sequence[Mapping[str, Any]], colour: str) -> None:
    names = [*runs[0]["layers"]]
    for run in runs:
        axes.plot([run["layers"][n] for n in names], ".-", color=colour, linewidth=0.8, alpha=0.7)
    axes.axhline(0.5, color="#1b1b1e", linewidth=0.8)
    axes.set_xticks(range(len(names)), [short(name) for name in names], rotation=45, fontsize=7.5)
    plain(axes)


def _text(axes: Axes, text: Passages, low: float, high: float) -> None:
    """Draw tokens in lines of monospaced text, each on its background colour."""
    line, column = 0, 0
    for piece, score in zip(text.pieces, text.scores, strict=True):
        letters = piece.replace("\n", "¶")
        if column + len(letters) > _COLUMNS:
            line, column, letters = line + 1, 0, letters.lstrip()
        strength = (score - low) / (high - low) if high > low else 0.0
        axes.add_patch(_ground(column, line, len(letters), strength))
        for offset, letter in enumerate(letters):
            axes.text(
                column + offset + 0.5, line + 0.5, letter, family="monospace", fontsize=7,
                ha="center", va="center",
            )  # fmt: skip
        column += len(letters)
    axes.set_xlim(0, _COLUMNS)
    axes.set_ylim(max(line + 1, _LINES), 0)
    axes.axis("off")


def _ground(column: int, line: int, width: int, strength: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column, line + 0.05), width, 0.9, color=_GROUND, alpha=0.9 * strength, lw=0)


MODELS = {"lab": "the lab's model", "demo": "the demo's model"}
MEASURES = {
    "chosen": "one layer, chosen on the other half",
    "all": "mean of all layers, nothing chosen",
    "speeches": "all layers, speeches alone",
    "bible": "all layers, Bible alone",
    "loss": "mean loss of the text instead",
}
_SUBJECTS: dict[str, Callable[[StudyConfig], RecitingModel]] = {"lab": lab_lm, "demo": demo_lm}


def _measure(config: StudyConfig) -> Figures:
    found = {}
    for name, make in _SUBJECTS.items():
        subject = make(config)
        config.report_stage("scoring passages and windows never seen")
        found[name] = to_four_decimals(_told(subject))
    return found


def _told(subject: RecitingModel) -> Figures:
    model, basis = subject.model, subject.basis
    texts = subject.passages, subject.controls
    known, unseen = (memorization_scores(model, basis, own.split(ROWS)) for own in texts)
    folds = [_judged(known, unseen, half) for half in (0, 1)]
    totals = [scores.of() for scores in (known, unseen)]
    # The first half of each set is from speeches, the second from the Bible.
    speeches, bible = (
        [part.tensor_split(2)[number] for part in totals] for number in (0, 1)
    )  # fmt: skip
    losses = [_losses(model, own) for own in texts]
    layer = folds[0]["layer"]
    places = [_middle(scores.of(layer)[1::2]) for scores in (known, unseen)]
    return {
        "texts": [len(own) for own in texts],
        "folds": folds,
        "chosen": mean(fold["auc"] for fold in folds),
        "all": auc(*totals),
        "speeches": auc(*speeches),
        "bible": auc(*bible),
        "loss": auc(-losses[0], -losses[1]),
        "layers": {
            name: auc(known.shares[:, i], unseen.shares[:, i])
            for i, name in enumerate(known.layers)
        },
        "shown": {
            "layer": layer,
            "by heart": _shown(subject, texts[0][1::2][places[0]], layer),
            "never seen": _shown(subject, texts[1][1::2][places[1]], layer),
        },
    }


def _judged(known: TextScores, unseen: TextScores, half: int) -> Figures:
    """Choose a layer on one half of both sets, and evaluate it on the other."""
    (layer,) = discriminative_layers(_half(known, half), _half(unseen, half), 1)
    other = [_half(scores, 1 - half).of(layer) for scores in (known, unseen)]
    return {"layer": layer, "auc": auc(*other)}


def _half(scores: TextScores, half: int) -> TextScores:
    """Return every other text, so that both halves are of both sources."""
    return TextScores(scores.layers, scores.shares[half::2], scores.flattest)


@torch.no_grad()
def _losses(model: Any, rows: Tensor) -> Tensor:
    """Return the mean loss of each text, float32 [texts]."""
    logits = torch.cat([model(input_ids=part).logits[:, :-1] for part in rows.split(ROWS)])
    return cross_entropy(logits.mT.float(), rows[:, 1:], reduction="none").mean(1)


def _middle(scores: Tensor) -> int:
    """Return the index of the lower median: a text of medium difficulty."""
    return int(scores.argsort()[(len(scores) - 1) // 2])


def _shown(subject: RecitingModel, text: Tensor, layer: str) -> Figures:
    """Return a text's tokens and their scores, without the end-of-text token before it."""
    scores = token_scores(subject.model, subject.basis, text[None], layer)[0, 1:]
    pieces = [subject.corpus.tokenizer.decode([token]) for token in text[1:].tolist()]
    return {"pieces": pieces, "scores": scores.tolist()}


def _tables(found: Sequence[Figures]) -> dict[str, Lines]:
    lines = [["AUC", *MODELS.values()]]
    for key, label in MEASURES.items():
        cells = [spread([run[name][key] for run in found], "{:.3f}") for name in MODELS]
        lines.append([label, *cells])
    chosen = [["seed", *(f"{label}, both halves" for label in MODELS.values())]]
    for number, run in enumerate(found):
        layers = [", ".join(fold["layer"] for fold in run[name]["folds"]) for name in MODELS]
        chosen.append([f"run {number + 1}", *layers])
    return {"passages against windows never seen": lines, "layers chosen": chosen}


def _picture(found: Sequence[Figures]) -> MatplotlibFigure:
    shown = found[0]["lab"]["shown"]
    texts = {
        f"{label}, {shown['layer']}": Passages(shown[label]["pieces"], shown[label]["scores"])
        for label in ("by heart", "never seen")
    }
    curves = {label: [run[name] for run in found] for name, label in MODELS.items()}
    return telling(curves, texts)


STUDY = Study(_measure, _tables, _picture)
