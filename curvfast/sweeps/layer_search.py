"""search_layers(): greedy forward selection of the layers to edit, by a supervised objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike

from torch import Tensor, nn

from curvfast.display import Bar
from curvfast.errors import InputError
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.kfac.importance import Importance
from curvfast.kfac.selection.rule import Rule
from curvfast.model.layers import LayerSpec
from curvfast.sweeps.frontier import SweepPoint
from curvfast.sweeps.log import SweepLog
from curvfast.sweeps.sweep import LayerSets, layer_sets, measured, measured_unedited
from curvfast.sweeps.trials import Hold, Measure, Trials


@dataclass(frozen=True)
class LayerSearch:
    """Result of a greedy layer search."""

    chosen: tuple[str, ...]
    """Candidates in the order they were added; empty if no edit was an improvement."""
    names: tuple[str, ...]
    """The layers of the candidates: ``layers=`` of :func:`curvfast.edit`."""
    objective: str
    """The minimised metric, or with a minus sign the maximised one."""
    labels: str
    """The caller's description of the labels that the search used."""
    steps: tuple[SweepPoint, ...]
    """The best edit of each round."""
    tried: tuple[SweepPoint, ...]
    """Every edit, round by round."""
    unedited: SweepPoint
    """The point of the unedited model."""

    def __str__(self) -> str:
        """Return a table of the rounds, and the labels that were used."""
        points = zip(("unedited", *(f"+ {title}" for title in self.chosen)),
                     (self.unedited, *self.steps), strict=True)  # fmt: skip
        lines = [
            "  ".join([title, *(f"{name} {value:.4g}" for name, value in point.metrics.items())])
            for title, point in points
        ]
        return "\n".join(
            [
                f"layers chosen by {self.objective!r}, knowing: {self.labels}", *lines,
                "numbers on the same data flatter this choice: report them on other",
            ]
        )  # fmt: skip


def search_layers(
    model: nn.Module,
    basis: Eigenbasis,
    mass: float | None = None,
    importance: Importance = "kfac",
    candidates: LayerSets | Sequence[LayerSpec | None] = None,
    *,
    evaluate: Measure | Sequence[Measure],
    objective: str,
    labels: str,
    at_most: Mapping[str, float] | None = None,
    most: int | None = None,
    fraction: float | None = None,
    corrections: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    out: str | PathLike[str] | None = None,
    hold: Hold = "device",
    progress: bool = True,
) -> LayerSearch:
    """Select layers to edit greedily, one candidate at a time, while the objective improves.

    Each round edits the layers chosen so far with each remaining candidate, at one size, and adds
    the candidate of lowest ``objective`` among those within ``at_most``; it stops when none
    improves. With n candidates that is at most n (n + 1) / 2 edits; the optimal set may be another.

    This is a supervised method: it uses whatever ``evaluate`` uses, such as passages known to be
    memorized. ``labels`` describes that, and is shown with the result. Report figures on data that
    the search has not used.

    Args:
        model: The model the basis was measured on, unedited.
        basis: Eigenbases by layer name.
        mass: Share in (0, 1] of each layer's summed score to keep.
        importance: How pairs are ranked, as in :func:`curvfast.select`.
        candidates: Sets of layers, as ``layers`` of :func:`curvfast.sweep`; None: each layer of the
            basis by itself.
        evaluate: Measures of an edited model, as in :func:`curvfast.sweep`.
        objective: The metric to minimise, such as ``"strict"``; with a minus sign before it, to
            maximise.
        labels: Description of the labels that ``evaluate`` uses: ``"200 passages known to be
            memorized; perplexity of held-out text"``.
        at_most: Upper bounds of metrics, such as ``{"perplexity": 22.8}``. If the unedited model
            exceeds one, any edit within them is an improvement.
        most: Largest number of candidates to add.
        fraction: Instead of ``mass``: share in [0, 1] of each layer's pairs.
        corrections: Λ by layer name, for the importances that take them.
        seed: Seed of ``"random"``.
        out: Log of the edits, as in :func:`curvfast.sweep`; it is also bound to ``labels``.
        hold: Where C is cached, as in :func:`curvfast.sweep`.
        progress: Whether a bar counts edits (on a terminal only).

    Returns:
        The chosen layers, and every edit that was tried.

    Raises:
        InputError: As in :func:`curvfast.sweep`; or if ``labels`` is empty, or ``objective`` or
            ``at_most`` name what ``evaluate`` does not return.
        BasisMismatch: If the basis is of another model.
        LayerNotFound: If a candidate matches nothing in the basis, ``corrections`` lack a layer, or
            one shares its weight with another module.
        ShapeError: If corrections are of another shape.
        StorageError: If ``out`` cannot be read or written.
    """
    if not labels.strip():
        raise InputError("labels= is empty: say in words what evaluate= knows about the data")
    size = (mass, fraction)
    Rule(*size)
    sets: dict[str, tuple[str, ...]] = {name: (name,) for name in basis}
    if candidates is not None:
        sets = layer_sets(model, basis, candidates)
    names = [n for n in basis if any(n in own for own in sets.values())]
    trials = Trials(
        model, basis, names, [importance], evaluate, corrections=corrections, seed=seed, hold=hold
    )
    log = SweepLog(out, trials, labels)
    unedited = measured_unedited(trials, log)
    score = _score(objective, at_most or {}, unedited)
    chosen: list[str] = []
    steps = [unedited]
    tried: list[SweepPoint] = []
    with Bar("search", None, "edits", progress) as bar:
        while len(chosen) < (len(sets) if most is None else min(most, len(sets))):
            found: dict[str, SweepPoint] = {}
            for title in (title for title in sets if title not in chosen):
                together = [*chosen, title]
                own = [n for n in names if any(n in sets[each] for each in together)]
                found[title] = measured(trials, log, importance, size, " + ".join(together), own)
                bar.advance(1)
            tried += found.values()
            best = min(found, key=lambda title: score(found[title]))
            if not score(found[best]) < score(steps[-1]):
                break
            chosen.append(best)
            steps.append(found[best])
    return LayerSearch(
        tuple(chosen), steps[-1].names, objective, labels, tuple(steps[1:]), tuple(tried), unedited
    )


def _score(
    objective: str, at_most: Mapping[str, float], unedited: SweepPoint
) -> Callable[[SweepPoint], float]:
    """Return the value to minimise: the objective, or infinity beyond a bound."""
    sign, metric = (-1, objective[1:]) if objective.startswith("-") else (1, objective)
    unknown = [name for name in (metric, *at_most) if name not in unedited.metrics]
    if unknown:
        raise InputError(
            f"evaluate= returned no {', '.join(map(repr, unknown))}, but "
            f"{', '.join(map(repr, unedited.metrics))}"
        )

    def score(point: SweepPoint) -> float:
        within = all(point.metrics[name] <= bound for name, bound in at_most.items())
        value = sign * point.metrics[metric]
        return value if within and not math.isnan(value) else math.inf

    return score
