"""Drive: runs a model over data to measure it, in passes over subsets of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from curvfast.adapters import LinearLayer
from curvfast.checkpoint import Checkpoint
from curvfast.convergence import Converged
from curvfast.distributed import Group, local, rank_and_size
from curvfast.errors import InputError
from curvfast.measurement import Measurement
from curvfast.passes import Pass
from curvfast.progress import Bar
from curvfast.steps import frozen
from curvfast.storage import checksum

LABELS = ("sampled", "gold")
M = TypeVar("M", bound=Measurement)
Begin = Callable[[dict[str, LinearLayer], bool, bool], M]
"""(layers of the pass, whether no activation is recomputed, whether it is one of many passes)."""


@dataclass(frozen=True)
class Drive:
    """Options of running a model over data; :func:`curvfast.collect_from` describes them."""

    labels: str
    tokens: int | None
    seed: int
    progress: bool
    keep_mode: bool
    layers_per_pass: int | None
    checkpoint: str | PathLike[str] | None
    every: int
    group: Group
    until: Converged | None = None

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            InputError: If one is out of range.
        """
        if self.labels not in LABELS:
            raise InputError(
                f"labels={self.labels!r}: pass 'sampled' (true Fisher) or 'gold' (empirical)"
            )
        if self.tokens is not None and self.tokens < 1:
            raise InputError(
                f"tokens={self.tokens}: pass a positive number of labels, or None for all"
            )
        if self.every < 1:
            raise InputError(
                f"every={self.every}: pass the number of batches between two checkpoints"
            )
        if self.layers_per_pass is not None and self.layers_per_pass < 1:
            raise InputError(
                f"layers_per_pass={self.layers_per_pass}: pass a number of layers, or None"
            )

    @property
    def facts(self) -> dict[str, Any]:
        """The facts that are saved with the result."""
        return {"labels": self.labels, "seed": self.seed}

    def passes(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        layers: dict[str, LinearLayer],
        causal: bool,
        begin: Begin[M],
        identity: Mapping[str, Any],
    ) -> Iterator[M]:
        """Yield the measurement of each pass once its data has run through.

        Args:
            model: Not wrapped by DistributedDataParallel.
            batches: Read anew by each pass.
            layers: All layers.
            causal: Whether position t predicts the label at t + 1.
            begin: Begins the measurement of a pass.
            identity: What else makes a checkpoint one of this measurement, JSON-able.

        Yields:
            What ``begin`` returned, closed.

        Raises:
            InputError: If there is nothing to count, or batches cannot be read again.
            StorageError: If the checkpoint is foreign, damaged, or of another measurement.
            DistributedError: If another rank is gone.
        """
        rank, world = rank_and_size(self.group)
        tokens = self.tokens and -(-self.tokens // world)
        device = next(model.parameters()).device
        chunks = list(_chunks(layers, self.layers_per_pass))
        if len(chunks) > 1 and iter(batches) is batches:
            raise InputError(
                f"{len(chunks)} passes need batches that can be read again: pass a list, a "
                "DataLoader or text_batches(), not a generator, or leave layers_per_pass= out"
            )
        for number, chosen in enumerate(chunks):
            generator = torch.Generator(device).manual_seed(self.seed + rank)
            whole = {
                **self.facts, "tokens": tokens, **identity, "pass": number,
                "until": self.until and asdict(self.until), "layers": list(chosen),
                "weights": _checksum(chosen),
            }  # fmt: skip
            part = f"pass-{number}" + (f"-rank-{rank}-of-{world}" if world > 1 else "")
            state = Checkpoint(Path(self.checkpoint) / part, whole) if self.checkpoint else None
            with (
                frozen(model, self.keep_mode) as driven,
                Bar("collect", tokens, "label", self.progress) as bar,
            ):
                measurement = begin(chosen, driven, len(chunks) > 1)
                try:
                    Pass(
                        model, measurement, self.labels, causal, generator, tokens, self.until,
                        state, self.every, self.group,
                    ).run(batches, bar)  # fmt: skip
                finally:
                    measurement.close()
            yield measurement


def merged_provenance(provenances: Sequence[Mapping[str, Any]], batches: Any) -> dict[str, Any]:
    """Return the provenance of all passes as one, with what the batches tell of themselves."""
    merged = dict(provenances[0])
    if len(provenances) > 1:
        merged["passes"] = [dict(each) for each in provenances]
        merged["unrouted"] = [name for each in provenances for name in each["unrouted"]]
    describe = getattr(batches, "provenance", None)
    if callable(describe):
        merged["data"] = describe()
    return merged


def _chunks(layers: dict[str, LinearLayer], size: int | None) -> Iterator[dict[str, LinearLayer]]:
    names = list(layers)
    for start in range(0, len(names), size or len(names)):
        yield {name: layers[name] for name in names[start : start + (size or len(names))]}


def _checksum(layers: dict[str, LinearLayer]) -> int:
    """Return a checksum of the first numbers of each weight: of these weights, not others."""
    return checksum(local(each.stored()).flatten()[:256].float() for each in layers.values())
