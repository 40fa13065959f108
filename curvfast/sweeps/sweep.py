"""sweep(): edits of one model at many sizes, by many importances, in many sets of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import TypeVar

from torch import Tensor, nn

from curvfast.display import Bar, aligned
from curvfast.errors import FormatError, InputError
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.kfac.importance import Importance, importance_frame
from curvfast.kfac.selection.rule import Rule
from curvfast.model.layers import LayerSpec, basis_layers
from curvfast.sweeps.frontier import UNEDITED, Matched, SweepPoint, matched
from curvfast.sweeps.log import SweepLog, read_points
from curvfast.sweeps.trials import Hold, Measure, Size, Trials

T = TypeVar("T", float, Importance)
LayerSets = LayerSpec | Mapping[str, LayerSpec | None] | None


@dataclass(frozen=True)
class Sweep:
    """Measured edits of one model; prints as a table."""

    unedited: SweepPoint
    """The point of the unedited model."""
    points: tuple[SweepPoint, ...]
    """In the order they were measured."""

    def matched(self, metric: str, value: float) -> Matched:
        """Compare importances and layers at one value of one metric.

        Each curve begins at the unedited model and is linear between neighbours. Where a noisy one
        reaches the value more than once, the first time counts, and the row says so. Nothing is
        extrapolated: a curve that does not reach the value says how far it goes.

        Args:
            metric: The metric to equalise: a name returned by ``evaluate``, such as
                ``"perplexity"``, or ``"kept_fraction"``.
            value: The common value.

        Returns:
            A row for each importance and set of layers.

        Raises:
            InputError: If there is no such metric.
        """
        return matched(self.unedited, self.points, metric, value)

    @classmethod
    def from_jsonl(cls, path: str | PathLike[str]) -> Sweep:
        """Read the log of a sweep, also while it is being written.

        Raises:
            FormatError: If it is no file of a sweep, of a newer format, or holds no point yet.
            StorageError: If it cannot be read.
        """
        unedited, points = read_points(path)
        if unedited is None:
            raise FormatError(f"{str(path)!r} holds no point yet")
        return cls(unedited, tuple(points))

    def __str__(self) -> str:
        """Return the points as an aligned table."""
        names = list(self.unedited.metrics)
        table = [["importance", "layers", "rule", "kept_fraction", *names, "seconds"]]
        table += [
            [
                point.importance, point.layers, _rule(point), f"{point.kept_fraction:.4f}",
                *(f"{point.metrics[name]:.4g}" for name in names), f"{point.seconds:.2f}",
            ]
            for point in (self.unedited, *self.points)
        ]  # fmt: skip
        return aligned(table, left=3)


def sweep(
    model: nn.Module,
    basis: Eigenbasis,
    mass: float | Sequence[float] | None = None,
    importance: Importance | Sequence[Importance] = "kfac",
    layers: LayerSets | Sequence[LayerSpec | None] = None,
    *,
    evaluate: Measure | Sequence[Measure],
    fraction: float | Sequence[float] | None = None,
    corrections: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    out: str | PathLike[str] | None = None,
    hold: Hold = "device",
    progress: bool = True,
) -> Sweep:
    """Edit and measure a model at every size, by every importance, in every set of layers.

    Each weight is rotated once for all points of one frame, C = U_Gᵀ W U_A. After each
    point the weights are the original ones, bit for bit, also if ``evaluate`` raises. A point's
    weights are those of :func:`curvfast.edit`, but for rounding.

    The same mass gives different sizes for different importances: compare with
    :meth:`Sweep.matched`, at one perplexity or kept fraction, or sweep over ``fraction``.

    Args:
        model: The model the basis was measured on, unedited. With several processes every rank
            makes the call, each with a separate ``out``.
        basis: Eigenbases by layer name.
        mass: Shares in (0, 1] of each layer's summed score to keep, as in :func:`curvfast.select`.
        importance: One or several, as in :func:`curvfast.select`.
        layers: Sets of layers, edited one set at a time: one set as in :func:`curvfast.collect`
            (None: all of the basis), a sequence of such, or a mapping from names to such.
        evaluate: Given the edited model, returns numbers by name; or several such functions, whose
            numbers are merged. Non-finite numbers count as NaN. It must restore modes and random
            states itself.
        fraction: Shares in [0, 1] of each layer's pairs, instead of ``mass`` or besides.
        corrections: As in :func:`curvfast.select`, for the importances that take them.
        seed: Seed of ``"random"``.
        out: A file of JSON lines: points are appended as they are measured, and those in it are not
            measured again. An unfinished line, left by a killed run, is dropped. It belongs to one
            model, basis, set of edited layers and seed; ``evaluate`` is not checked.
        hold: Where C is cached between points: ``"device"``, 4 bytes per weight beside it;
            ``"cpu"``; or ``"anew"``, not at all: it is recomputed for each point. Weights are
            copied in any case, and ``"svd"`` holds all singular vectors.
        progress: Whether a bar counts points (on a terminal only).

    Returns:
        The points, with the unedited model's.

    Raises:
        InputError: If a rule or another argument is out of range, an importance does not go with
            the basis or ``corrections``, ``evaluate`` returns no numbers by name or others than
            before, or ``out`` is of another sweep.
        BasisMismatch: If the basis is of another model.
        LayerNotFound: If a set of layers matches nothing in the basis, ``corrections`` lack one, or
            one shares its weight with another module.
        ShapeError: If corrections are of another shape.
        StorageError: If ``out`` cannot be read or written.
    """
    sizes = _sizes(mass, fraction)
    importances = _each("importance", importance)
    sets = layer_sets(model, basis, layers)
    names = [n for n in basis if any(n in own for own in sets.values())]
    trials = Trials(
        model, basis, names, importances, evaluate, corrections=corrections, seed=seed, hold=hold
    )
    log = SweepLog(out, trials)
    # One frame after the other, so that each weight is rotated once per frame.
    frames = list(dict.fromkeys(map(importance_frame, importances)))
    importances.sort(key=lambda each: frames.index(importance_frame(each)))
    points = []
    with Bar("sweep", 1 + len(importances) * len(sets) * len(sizes), "points", progress) as bar:
        unedited = measured_unedited(trials, log)
        bar.advance(1)
        for each in importances:
            for title, own in sets.items():
                for size in sizes:
                    points.append(measured(trials, log, each, size, title, own))
                    bar.advance(1)
    return Sweep(unedited, tuple(points))


def measured_unedited(trials: Trials, log: SweepLog) -> SweepPoint:
    """Return the unedited model's point, measured unless it is in the log."""
    key = (UNEDITED, (), None, None)
    if key not in log:
        log.add(trials.unedited())
    return log[key]


def measured(
    trials: Trials,
    log: SweepLog,
    importance: Importance,
    size: Size,
    layers: str,
    names: Sequence[str],
) -> SweepPoint:
    """Return a point of :meth:`Trials.point`, measured unless it is in the log."""
    key = (importance, tuple(names), *size)
    if key not in log:
        log.add(trials.point(importance, size, layers, names))
    return replace(log[key], layers=layers)


def layer_sets(
    model: nn.Module, basis: Eigenbasis, layers: LayerSets | Sequence[LayerSpec | None]
) -> dict[str, tuple[str, ...]]:
    """Return the layer names of each set of layers, by the title of the set.

    Raises:
        InputError: If two sets have one title, or are the same.
        BasisMismatch: If the basis is of another model.
        LayerNotFound: If a set matches nothing in the basis.
    """
    if isinstance(layers, Mapping):
        asked = list(layers.items())
    elif layers is None or isinstance(layers, str) or callable(layers):
        asked = [(_title(layers), layers)]
    else:
        asked = [(_title(spec), spec) for spec in layers]
    found: dict[str, tuple[str, ...]] = {}
    for title, spec in asked:
        names = tuple(basis_layers(model, basis, spec))
        if title in found or names in found.values():
            raise InputError(f"layers= has {title!r} twice, or what means the same layers")
        found[title] = names
    if not found:
        raise InputError("layers= is empty: pass a set of layers, or None for all of the basis")
    return found


def _title(spec: LayerSpec | None) -> str:
    if spec is None:
        return "all"
    if isinstance(spec, str):
        return spec
    return getattr(spec, "__name__", "predicate") if callable(spec) else ", ".join(spec)


def _sizes(
    mass: float | Sequence[float] | None, fraction: float | Sequence[float] | None
) -> list[Size]:
    sizes: list[Size] = []
    if mass is not None:
        sizes += [(float(own), None) for own in _each("mass", mass)]
    if fraction is not None:
        sizes += [(None, float(own)) for own in _each("fraction", fraction)]
    if not sizes:
        raise InputError("pass mass= or fraction=, one or several of either")
    for size in sizes:
        Rule(*size)
    return sizes


def _each(title: str, given: T | Sequence[T]) -> list[T]:
    """Return one or several given values as a list without duplicates."""
    found = [given] if isinstance(given, (str, float, int)) else list(given)
    if not found:
        raise InputError(f"{title}= is empty")
    return list(dict.fromkeys(found))


def _rule(point: SweepPoint) -> str:
    if point.mass is not None:
        return f"mass {point.mass:g}"
    return "" if point.fraction is None else f"fraction {point.fraction:g}"
