"""Whose rows count, in loops that people write: exact, however the model is called."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from cases import llama
from loops import (
    BERT,
    Loop,
    Step,
    assert_exact,
    everything,
    not_last,
    only,
    placed,
    shifted,
    tokens,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import curvfast

pytestmark = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.2.mlp.down_proj"

# ---- how the model is called ----------------------------------------------------------------


class AnyKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lm = llama()

    def forward(self, **batch: Any) -> Any:
        return self.lm(**batch)


class OneMapping(AnyKeyword):
    def forward(self, batch: Mapping[str, Any]) -> Any:
        return self.lm(**batch)


class AnyPosition(AnyKeyword):
    def forward(self, *batch: Tensor) -> Any:
        ids, mask, labels = batch
        return self.lm(input_ids=ids, attention_mask=mask, labels=labels)


def _wrapped(wrapper: type[AnyKeyword], call: Callable[..., Any]) -> Loop:
    model, steps = wrapper(), []
    for real in ((4, 7, 6), (7, 3, 5)):
        ids, mask, labels = tokens(real=real)

        def loss(ids: Tensor = ids, mask: Tensor = mask, labels: Tensor = labels) -> Tensor:
            return call(model, ids, mask, labels).loss

        def summed(ids: Tensor = ids, mask: Tensor = mask, labels: Tensor = labels) -> Tensor:
            return shifted(model.lm(input_ids=ids, attention_mask=mask).logits, labels)

        steps.append(Step(loss, summed, only(not_last(mask))))
    return Loop(model, ["lm." + UP, "lm." + DOWN], steps)


def _fields(ids: Tensor, mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def keywords_of_any_name() -> Loop:
    return _wrapped(AnyKeyword, lambda model, *batch: model(**_fields(*batch)))


def one_dictionary() -> Loop:
    return _wrapped(OneMapping, lambda model, *batch: model(_fields(*batch)))


def one_mapping_that_is_no_dictionary() -> Loop:
    return _wrapped(OneMapping, lambda model, *batch: model(batch=UserDict(_fields(*batch))))


def positions_of_no_name() -> Loop:
    return _wrapped(AnyPosition, lambda model, *batch: model(*batch))


def _bypassed(call: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> Loop:
    model, steps = llama(), []
    for real in ((2, 7, 7), (7, 7, 3)):
        ids, mask, labels = tokens(real=real)

        def tell(curvature: Any, mask: Tensor = mask, labels: Tensor = labels) -> None:
            curvature.mask(mask)
            curvature.labels(int((labels[:, 1:] != -100).sum()))

        def loss(
            ids: Tensor = ids, mask: Tensor = mask, labels: Tensor = labels, how: str = "mean"
        ) -> Tensor:
            return shifted(call(model, ids, mask), labels, how)

        def summed(loss: Callable[..., Tensor] = loss) -> Tensor:
            return loss(how="sum")

        steps.append(Step(loss, summed, only(not_last(mask)), tell))
    return Loop(model, [UP, DOWN], steps)


def a_part_of_the_model() -> Loop:
    def call(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return model.lm_head(hidden)

    return _bypassed(call)


def the_forward_method() -> Loop:
    return _bypassed(
        lambda model, ids, mask: model.forward(input_ids=ids, attention_mask=mask).logits
    )


@pytest.mark.parametrize(
    "make",
    [
        keywords_of_any_name, one_dictionary, one_mapping_that_is_no_dictionary,
        positions_of_no_name, a_part_of_the_model, the_forward_method,
    ],
)  # fmt: skip
def test_what_counts_does_not_depend_on_how_the_model_is_called(make: Callable[[], Loop]) -> None:
    assert_exact(make())


# ---- whose mask -----------------------------------------------------------------------------


def _seq2seq(model: nn.Module, names: list[str], of_source: str) -> Loop:
    source, target = torch.randint(3, 50, (2, 6)), torch.randint(3, 50, (2, 6))
    masks = [(torch.arange(6) < torch.tensor(real)[:, None]).long() for real in ((2, 6), (6, 4))]
    labels = target.masked_fill(masks[1] == 0, -100)
    call = {
        "input_ids": source, "attention_mask": masks[0], "decoder_attention_mask": masks[1],
        "labels": labels,
    }  # fmt: skip

    def keep(name: str, shape: torch.Size) -> Tensor:
        return masks[0 if of_source in name else 1].bool()

    def loss() -> Tensor:
        return model(**call).loss

    return Loop(model, names, [Step(loss, lambda: loss() * (labels != -100).sum(), keep)])


def encoder_and_decoder_of_one_length() -> Loop:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_decoder_layers=1,
        num_heads=2, dropout_rate=0.0, decoder_start_token_id=0,
    )  # fmt: skip
    names = [
        "encoder.block.0.layer.1.DenseReluDense.wi",
        "decoder.block.0.layer.2.DenseReluDense.wi",
    ]
    return _seq2seq(T5ForConditionalGeneration(config), names, "encoder.block")


def keys_of_a_cross_attention() -> Loop:
    """Its keys are rows of the source though its queries, and its name, are the decoder's."""
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, dropout=0.0,
        max_position_embeddings=32, decoder_start_token_id=2,
    )  # fmt: skip
    names = [f"model.decoder.layers.0.encoder_attn.{leaf}_proj" for leaf in "kq"]
    return _seq2seq(BartForConditionalGeneration(config), names, "encoder_attn.k")


class Encoder(nn.Module):
    """torch's own encoder behind an embedding, in either order of its axes."""

    def __init__(self, polarity: str, *, batch_first: bool) -> None:
        super().__init__()
        self.batch_first, self.polarity = batch_first, polarity
        self.emb, self.out = nn.Embedding(50, 16), nn.Linear(16, 50)
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=batch_first)
        self.enc = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        padding = torch.arange(ids.shape[1]) >= lengths[:, None]
        if self.polarity == "float":
            padding = torch.zeros(padding.shape).masked_fill(padding, -torch.inf)
        x = self.emb(ids)
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.out(self.enc(x, src_key_padding_mask=padding))
        return x if self.batch_first else x.transpose(0, 1)


def _encoded(polarity: str, *, batch_first: bool) -> Loop:
    model = Encoder(polarity, batch_first=batch_first)
    ids, mask, labels = tokens()
    keep = mask.bool() if batch_first else mask.bool().T

    def loss(how: str = "mean") -> Tensor:
        return placed(model(ids, mask.sum(1)), labels, how)

    def tell(curvature: Any) -> None:
        curvature.labels(int(mask.sum()))

    layers = ["enc.layers.0.linear1"]
    return Loop(model, layers, [Step(loss, lambda: loss("sum"), only(keep), tell)])


def sequence_first() -> Loop:
    return _encoded("bool", batch_first=False)


def true_where_padding_is() -> Loop:
    return _encoded("bool", batch_first=True)


def minus_infinity_where_padding_is() -> Loop:
    return _encoded("float", batch_first=False)


def one_row_a_sequence() -> Loop:
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(**BERT))
    ids, mask, _ = tokens()
    classes = torch.tensor([0, 1, 1])

    def keep(name: str, shape: torch.Size) -> Tensor:
        return everything(name, shape) if "pooler" in name else mask.bool()

    return Loop(
        model,
        ["bert.encoder.layer.0.intermediate.dense", "bert.pooler.dense"],
        [
            Step(
                lambda: model(input_ids=ids, attention_mask=mask, labels=classes).loss,
                lambda: cross_entropy(
                    model(input_ids=ids, attention_mask=mask).logits, classes, reduction="sum"
                ),
                keep,
            )
        ],
    )


@pytest.mark.parametrize(
    "make",
    [
        encoder_and_decoder_of_one_length, keys_of_a_cross_attention, sequence_first,
        true_where_padding_is, minus_infinity_where_padding_is, one_row_a_sequence,
    ],
)  # fmt: skip
def test_a_token_stream_goes_by_its_own_mask(make: Callable[[], Loop]) -> None:
    assert_exact(make())


# ---- causal or not --------------------------------------------------------------------------


class Averages(nn.Module):
    """A causal model by hand: each position sees the mean of those before it."""

    def __init__(self, shift: int = 1) -> None:
        super().__init__()
        self.shift = shift
        self.emb, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def mixed(self, x: Tensor, starts: list[int]) -> Tensor:
        parts = x.tensor_split(starts[1:], 1)
        return torch.cat([p.cumsum(1) / torch.arange(1, p.shape[1] + 1)[:, None] for p in parts], 1)

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, cu_seq_lens: Tensor | None = None
    ) -> Any:
        starts = [0] if cu_seq_lens is None else cu_seq_lens[:-1].tolist()
        x = self.mixed(self.emb(input_ids), starts)
        logits = self.head(x + self.down(self.up(x).relu()))
        if labels is None:
            return logits
        return (shifted if self.shift else placed)(logits, labels, "mean"), logits


class TinyForCausalLM(Averages):
    """Takes labels that its data set has shifted before."""

    def __init__(self) -> None:
        super().__init__(shift=0)


def a_model_of_ones_own() -> Loop:
    model = Averages()
    ids, mask, _ = tokens(real=(7, 7, 7))
    return Loop(
        model,
        ["up", "down"],
        [
            Step(
                lambda: model(ids, labels=ids)[0],
                lambda: shifted(model(ids), ids),
                only(not_last(mask)),
            )
        ],
    )


def its_loss_outside() -> Loop:
    model = Averages()
    ids, mask, _ = tokens(real=(7, 7, 7))
    steps = [
        Step(
            lambda: shifted(model(ids), ids, "mean"),
            lambda: shifted(model(ids), ids),
            only(not_last(mask)),
        )
    ]
    return Loop(model, ["up", "down"], steps)


def labels_shifted_before() -> Loop:
    """The last position has a label too, whatever the class is called."""
    model = TinyForCausalLM()
    ids, following = torch.randint(3, 50, (3, 7)), torch.randint(3, 50, (3, 7))
    steps = [Step(lambda: model(ids, labels=following)[0], lambda: placed(model(ids), following))]
    return Loop(model, ["up", "down"], steps)


def a_language_model_that_sees() -> Loop:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text = {
        "model_type": "llama", "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 20,
        "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=1)
    model = LlavaForConditionalGeneration(config).train()
    ids, mask, labels = tokens()
    name = next(n for n, _ in model.named_modules() if n.endswith("model.layers.0.mlp.up_proj"))
    return Loop(
        model,
        [name],
        [
            Step(
                lambda: model(input_ids=ids, attention_mask=mask, labels=labels).loss,
                lambda: shifted(model(input_ids=ids, attention_mask=mask).logits, labels),
                only(not_last(mask)),
            )
        ],
    )


@pytest.mark.parametrize(
    "make",
    [a_model_of_ones_own, its_loss_outside, labels_shifted_before, a_language_model_that_sees],
)
def test_the_loss_says_whether_a_model_is_causal(make: Callable[[], Loop]) -> None:
    assert_exact(make())


# ---- packed documents -----------------------------------------------------------------------


def _packed(positions: Tensor, ends: list[tuple[int, int]], pads: Tensor | None = None) -> Loop:
    model = llama().train()
    ids = torch.randint(3, 50, positions.shape)
    labels, keep = ids.clone(), torch.ones(positions.shape, dtype=torch.bool)
    labels[positions == 0] = -100  # the first of a document is no one's next token
    for row, place in ends:
        keep[row, place] = False
    if pads is not None:
        labels, keep = labels.masked_fill(pads, -100), keep & ~pads
    # With a cache attention would cross the joints.
    call = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    return Loop(
        model,
        [UP, DOWN],
        [
            Step(
                lambda: model(**call, labels=labels).loss,
                lambda: shifted(model(**call).logits, labels),
                only(keep),
            )
        ],
    )


def positions_that_start_again() -> Loop:
    return _packed(torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), [(0, 3), (0, 8)])


def rows_packed_differently() -> Loop:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 1]])
    return _packed(positions, [(0, 2), (0, 7), (1, 5), (1, 7)])


def a_tail_of_padding() -> Loop:
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])
    pads = torch.zeros(1, 9, dtype=torch.bool)
    pads[0, 7:] = True
    return _packed(positions, [(0, 3), (0, 6)], pads)


def boundaries_of_a_flattened_batch() -> Loop:
    model = Averages()
    ids, bounds = torch.randint(3, 50, (1, 9)), torch.tensor([0, 4, 9])
    labels, keep = ids.clone(), torch.ones(1, 9, dtype=torch.bool)
    labels[0, 4] = -100
    keep[0, [3, 8]] = False
    return Loop(
        model,
        ["up", "down"],
        [
            Step(
                lambda: model(ids, labels=labels, cu_seq_lens=bounds)[0],
                lambda: shifted(model(ids, cu_seq_lens=bounds), labels),
                only(keep),
            )
        ],
    )


@pytest.mark.parametrize(
    "make",
    [
        positions_that_start_again, rows_packed_differently, a_tail_of_padding,
        boundaries_of_a_flattened_batch,
    ],
)  # fmt: skip
def test_the_last_token_of_each_packed_document_is_left_out(make: Callable[[], Loop]) -> None:
    assert_exact(make())


def test_tokens_embedded_by_the_loop_itself_begin_no_batch() -> None:
    model = llama()
    ids, mask, _ = tokens(real=(3, 7, 4))
    with curvfast.collect(model, [UP]) as curvature:
        curvature.mask(mask)
        embedded = model.get_input_embeddings()(ids)
        # Labels of pads too, so that only the mask tells which positions are real.
        model(inputs_embeds=embedded, labels=ids).loss.backward()
    assert curvature.coverage().covered[f"{UP}.weight"] == int(mask.sum()) - len(ids)
