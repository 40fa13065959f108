"""TokenStream: a grid of positions, and which of them count.

A position counts if it is real and can reach a label. It is not a pad. In a causal stream it is not
after the last label of its sequence or document or, where no labels are known, not its last real
position (arXiv 2510.24256, appendix on data collection). In one that is not causal every real
position counts.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from curvfast.model.rows import IGNORED_LABEL

EVERY_ROW = "every row"
TEXT, SOURCE, DECODER, IMAGE = "text", "source", "decoder", "image"


@dataclass(frozen=True, eq=False)
class TokenStream:
    """Positions that rows may stand for, such as source tokens, target tokens or image patches."""

    by: str
    """Who says so, such as "attention_mask of LlamaModel"."""
    grid: torch.Size | None = None
    """[..., length], sequences first; None where it is not known."""
    role: str = TEXT
    mask: Tensor | None = None
    """Real positions, bool [*grid]; None where all are."""
    documents: Tensor | None = None
    """int [*grid]: numbers that tell adjacent documents of a sequence apart."""
    position_ids: Tensor | None = None
    """int [*grid]: they start again with each document."""
    ends: Tensor | None = None
    """int [documents + 1]: where documents begin in the flattened grid."""
    labels: Tensor | None = None
    """int [*grid]: of each position, not of the one that predicts it; -100 where there is none."""
    shift_labels: Tensor | None = None
    """int [*grid]: the label that each position predicts."""
    tokens: Tensor | None = None
    """The ids that were given, if they were."""
    states: weakref.ref[Tensor] | None = None
    """The embeddings or states that were given in their place, held by others."""
    raw_mask: Tensor | None = None
    """The mask as it was given."""
    problem: str | None = None
    """Why what was said of its positions cannot be used, if it cannot."""
    _kept: dict[bool, Tensor | None] = field(default_factory=dict)

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return 1 if self.grid is None else self.grid[:-1].numel()

    def given(self) -> Tensor | None:
        """Return the ids, embeddings or states that were given, if they are still there."""
        return self.tokens if self.states is None else self.states()

    def whole(self, skip_last: bool) -> bool:
        """Return whether every position counts, as far as is known without looking.

        Args:
            skip_last: Whether the stream is causal, and the label of a position the next one's.
        """
        return self.role == IMAGE or (self.mask is None and not self._causal(skip_last))

    def all_but_last(self, skip_last: bool) -> bool:
        """Return whether, without looking, all positions count but the last of each sequence.

        Args:
            skip_last: As above.
        """
        packed = (self.position_ids, self.ends, self.documents, self.shift_labels)
        labelled = self.labels is None or _same(self.labels, self.tokens)
        plain = self.mask is None and all(each is None for each in packed)
        return plain and labelled and skip_last and self.role == TEXT

    def keep(self, skip_last: bool, scored: Tensor | None = None) -> Tensor | None:
        """Return which positions count, bool [*grid], or None where all do.

        Args:
            skip_last: As above.
            scored: bool [*grid], positions whose prediction is scored, if labels of a call do not
                tell.
        """
        if scored is not None and scored.shape == self.grid:
            return self._reaching(scored)
        if skip_last not in self._kept:
            self._kept[skip_last] = self._keep(skip_last)
        return self._kept[skip_last]

    def rule(self, skip_last: bool) -> str:
        """Return what counts, in words that do not depend on the batch.

        Args:
            skip_last: As above.
        """
        if self.role == IMAGE:
            return EVERY_ROW
        if not self._causal(skip_last):
            return "real positions"
        return "real positions up to the one that predicts the last label"

    def _causal(self, skip_last: bool) -> bool:
        if self.role == DECODER:
            return skip_last or self.labels is not None
        return skip_last and self.role == TEXT

    def _keep(self, skip_last: bool) -> Tensor | None:
        if self.whole(skip_last) or self.grid is None:
            return None
        if not self._causal(skip_last):
            return self.mask
        scored = self._scored(skip_last)
        if scored is None:
            real = self._real()
            if not self._packed:
                return drop_last(real)
            return real & (self._from_here(real) > 1)
        return self._reaching(scored)

    def _reaching(self, scored: Tensor) -> Tensor:
        """Return the real positions at or before a scored one of their document."""
        real = self._real(scored.device)
        scored = scored & real
        ahead = self._from_here(scored) if self._packed else _from_here(scored)
        return real & (ahead > 0)

    def _scored(self, skip_last: bool) -> Tensor | None:
        """Return which positions predict a label, or None where no labels are known."""
        if self.shift_labels is not None:
            return self.shift_labels != IGNORED_LABEL
        if self.labels is None:
            return None
        labelled = self.labels != IGNORED_LABEL
        if self.mask is not None:
            labelled = labelled & self.mask.to(labelled.device)  # a pad's label is none
        return pad(labelled[..., 1:], (0, 1)) if skip_last else labelled

    @property
    def packed(self) -> bool:
        """Whether a document begins inside a sequence."""
        return self._packed and self.grid is not None and bool(self._begins().any())

    @property
    def _packed(self) -> bool:
        return any(e is not None for e in (self.position_ids, self.ends, self.documents))

    def _real(self, device: torch.device | None = None) -> Tensor:
        assert self.grid is not None
        if self.mask is not None:
            return self.mask
        near = (self.position_ids, self.ends, self.documents, self.labels, self.tokens)
        device = device or next((each.device for each in near if each is not None), None)
        return torch.ones(self.grid, dtype=torch.bool, device=device or "cpu")

    def _from_here(self, what: Tensor) -> Tensor:
        """Return how many of ``what`` are at or after each position, of its own document."""
        counts = _from_here(what)  # [*grid]
        begins = self._begins()
        # What is ahead of the next document's beginning is not of this one.
        length = what.shape[-1]
        places = torch.arange(length, device=what.device).expand(what.shape)
        after = torch.where(begins, places, length)  # the place, where a document begins
        nearest = pad(after, (0, 1), value=length)[..., 1:].flip(-1).cummin(-1).values.flip(-1)
        return counts - pad(counts, (0, 1)).gather(-1, nearest)

    def _begins(self) -> Tensor:
        """Return where a document begins, bool [*grid]."""
        real = self._real()
        begins = torch.zeros_like(real)
        if self.position_ids is not None:
            own = self.position_ids.expand(real.shape).to(real.device)
            before, here = own[..., :-1], own[..., 1:]
            again = (here < before) | ((here == before) & (here == 0))
            # Positions of padding say nothing.
            begins[..., 1:] |= again & real[..., :-1] & real[..., 1:]
        if self.documents is not None:
            other = self.documents[..., :-1] != self.documents[..., 1:]
            begins[..., 1:] |= other & real[..., :-1] & real[..., 1:]
        if self.ends is not None:
            places = self.ends.to(real.device).long().clamp(max=real.numel())
            flat = pad(begins.flatten(), (0, 1)).index_fill(0, places, True)
            begins = flat[:-1].view(real.shape)
        return begins


def drop_last(real: Tensor) -> Tensor:
    """Return ``real`` [..., length] without the last real position of each sequence."""
    return real & (_from_here(real) > 1)


def _from_here(what: Tensor) -> Tensor:
    """Return how many of ``what`` [..., length] are at or after each position."""
    return what.flip(-1).cumsum(-1).flip(-1)


def _same(one: Tensor, two: Tensor | None) -> bool:
    return two is not None and one.shape == two.shape and one.data_ptr() == two.data_ptr()
