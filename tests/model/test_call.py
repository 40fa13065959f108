"""What a module's call says, found by name wherever the loop put it; and which positions count."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from curvfast.model.call import Reader, real_positions
from curvfast.model.stream import TokenStream

IDS = torch.arange(3, 11).view(2, 4)
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])


@dataclass
class Held:
    input_ids: Tensor
    attention_mask: Tensor


Tuple = namedtuple("Tuple", ["input_ids", "attention_mask"])


class Plain(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None) -> None:
        pass


class CatchAll(nn.Module):
    def forward(self, *anything: Any, **more: Any) -> None:
        pass


class One(nn.Module):
    def forward(self, batch: Any, number: int = 0) -> None:
        pass


BOTH = {"input_ids": IDS, "attention_mask": MASK}


@pytest.mark.parametrize(
    ("module", "args", "kwargs"),
    [
        (Plain(), (IDS, MASK), {}),
        (Plain(), (IDS,), {"attention_mask": MASK}),
        (CatchAll(), (), BOTH),
        (CatchAll(), (BOTH,), {}),
        (One(), (BOTH, 3), {}),
        (One(), (Held(IDS, MASK),), {}),
        (One(), (Tuple(IDS, MASK),), {}),
        (One(), (SimpleNamespace(**BOTH),), {}),
        (One(), ({"text": {"inputs": BOTH}},), {}),
        (One(), ([BOTH],), {"number": 1}),
    ],
)
def test_arguments_are_found_wherever_they_are(module: nn.Module, args: Any, kwargs: Any) -> None:
    call = Reader(module).read(args, kwargs)
    assert call.ids is IDS
    assert call.mask is MASK
    assert (call.mask_name, call.grid) == ("attention_mask", IDS.shape)


def test_what_is_no_padding_mask_is_not_read_as_one() -> None:
    others = dict(
        head_mask=torch.ones(2, 4), bool_masked_pos=MASK, global_attention_mask=MASK,
        special_tokens_mask=MASK, token_type_ids=MASK, loss_mask=MASK, perm_mask=MASK,
        src_mask=torch.ones(4, 4), pixel_mask=torch.ones(2, 4),
    )  # fmt: skip
    call = Reader(CatchAll()).read((), {"input_ids": IDS, **others})
    assert call.mask is None
    assert call.ids is IDS


def test_patterns_and_masks_of_other_shapes_are_no_masks_of_positions() -> None:
    pattern = torch.ones(2, 1, 4, 4)
    call = Reader(Plain()).read((IDS, pattern), {})
    assert call.mask is None
    assert call.pattern is pattern
    longer = torch.ones(2, 6)
    assert Reader(Plain()).read((IDS, longer), {}).mask.shape == IDS.shape


def test_polarity_is_the_name_s_and_the_type_s() -> None:
    real = MASK.bool()
    added = torch.zeros(2, 4).masked_fill(~real, float("-inf"))
    for name, mask in [
        ("attention_mask", MASK), ("attention_mask", real), ("attention_mask", MASK.float()),
        ("attention_mask", added), ("src_key_padding_mask", ~real), ("padding_mask", ~real),
        ("src_key_padding_mask", added), ("attention_mask", MASK * torch.tensor([[2], [3]])),
        ("mask", added.clamp_min(torch.finfo(torch.float16).min)),
    ]:  # fmt: skip
        assert torch.equal(real_positions(name, mask), real), (name, mask.dtype)
    assert real_positions("attention_mask", torch.zeros(2, 4)).all()


def test_a_first_tensor_of_integers_is_ids_by_any_name_but_labels() -> None:
    class Own(nn.Module):
        def forward(self, sequence: Tensor, targets: Any = None) -> None:
            pass

    call = Reader(Own()).read((IDS, IDS + 1), {})
    assert call.ids is IDS
    assert call.labels is None


@st.composite
def packed(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Return documents (0 is padding), position_ids and labels (-100 is none) of some rows."""
    length = draw(st.integers(1, 8))
    documents, places, labels = [], [], []
    for _ in range(draw(st.integers(1, 3))):
        real = draw(st.integers(0, length))
        joints = [draw(st.booleans()) for _ in range(length)]
        own, place = [], []
        for t in range(length):
            new = t == 0 or (joints[t] and t < real)
            own.append(0 if t >= real else (own[-1] + 1 if t and new else 1 if t == 0 else own[-1]))
            place.append(0 if new or t >= real else place[-1] + 1)
        documents.append(own)
        places.append(place)
        labels.append([draw(st.sampled_from([-100, 5])) for _ in range(length)])
    return documents, places, labels


@given(packed(), st.booleans(), st.sampled_from(["places", "numbers", "none"]), st.booleans())
def test_what_counts_is_real_and_can_reach_a_label(
    drawn: Any, labelled: bool, told: str, padded: bool
) -> None:
    documents, places, labels = drawn
    mask = torch.tensor(documents) != 0
    if told == "none":
        documents = [[min(d, 1) for d in row] for row in documents]
    elif not padded:
        return
    if not padded:
        mask = torch.ones_like(mask)
        documents = [[1] * len(row) for row in documents]
    stream = TokenStream(
        "", mask.shape, mask=mask if padded else None,
        position_ids=torch.tensor(places) if told == "places" else None,
        documents=torch.tensor(documents) if told == "numbers" else None,
        labels=torch.tensor(labels) if labelled else None,
    )  # fmt: skip
    keep = stream.keep(skip_last=True)
    assert keep is not None
    for b, row in enumerate(documents):
        for t, own in enumerate(row):
            reached = False
            for later in range(t, len(row) - 1):
                if not own or row[later] not in (own,):
                    break
                if labelled:
                    pad = padded and not row[later + 1]
                    reached |= labels[b][later + 1] != -100 and not pad
                else:
                    reached |= row[later + 1] == own
            assert bool(keep[b, t]) == (bool(own) and reached), (b, t)


def test_without_causality_every_real_position_counts() -> None:
    mask = MASK.bool()
    stream = TokenStream("", mask.shape, mask=mask, labels=IDS)
    assert torch.equal(stream.keep(skip_last=False), mask)
    assert TokenStream("", mask.shape, labels=IDS).keep(skip_last=False) is None
