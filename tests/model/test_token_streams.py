"""Rows of layers belong to a token stream: tiny models of many kinds, against masks by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from seen_rows import seen_rows
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from curvfast.errors import ShapeError
from curvfast.model.layer import LinearLayer
from curvfast.model.token_streams import TokenStreams

SMALL = dict(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=64,
)  # fmt: skip
UP = "model.layers.1.mlp.up_proj"


def llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, **options)).train()


def padded(rows: int = 2, length: int = 7, left: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, 50, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    mask = mask.flip(-1) if left else mask
    return ids, mask, ids.masked_fill(mask == 0, -100)


def not_last(mask: Tensor) -> Tensor:
    """Return all real positions but the last of each row, by a loop."""
    keep = mask.bool().clone()
    for row in keep:
        row[int(row.nonzero().max())] = False
    return keep


class Wrapped(nn.Module):
    """Hands a batch on to a language model, as loops of many kinds do."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm


class CatchAll(Wrapped):
    def forward(self, **anything: Any) -> Any:
        return self.lm(**anything)


class Positional(Wrapped):
    def forward(self, *given: Any, **more: Any) -> Any:
        return self.lm(*given, **more)


class OneBatch(Wrapped):
    def forward(self, batch: Any) -> Any:
        return self.lm(**(batch if isinstance(batch, dict) else vars(batch)))


class Nested(Wrapped):
    def forward(self, batch: Any, step: int) -> Any:
        return self.lm(**batch["inputs"]["text"])


@pytest.mark.parametrize("left", [False, True])
def test_a_causal_stream_counts_real_positions_but_the_last(left: bool) -> None:
    model, (ids, mask, labels) = llama(), padded(left=left)
    call = dict(input_ids=ids, attention_mask=mask)
    seen = seen_rows(model, [UP], lambda: model(**call), skip_last=True)
    assert torch.equal(seen.kept(UP), not_last(mask))
    seen = seen_rows(model, [UP], lambda: model(**call, labels=labels), skip_last=True)
    assert torch.equal(seen.kept(UP), not_last(mask))


@pytest.mark.parametrize("wrapper", [CatchAll, Positional, OneBatch, Nested])
def test_wrappers_do_not_hide_a_mask(wrapper: type[Wrapped]) -> None:
    model, (ids, mask, labels) = wrapper(llama()), padded()
    call = dict(input_ids=ids, attention_mask=mask, labels=labels)

    def run() -> Any:
        if wrapper is OneBatch:
            return model(SimpleNamespace(**call))
        if wrapper is Nested:
            return model({"inputs": {"text": call}}, 3)
        return model(ids, mask, labels=labels) if wrapper is Positional else model(**call)

    name = f"lm.{UP}"
    assert torch.equal(seen_rows(model, [name], run, skip_last=True).kept(name), not_last(mask))


def test_rows_after_the_last_label_do_not_count_and_a_prompt_does() -> None:
    model, (ids, _, _) = llama(), padded()
    labels = ids.clone()
    labels[:, :3] = -100
    labels[0, 5:] = -100
    seen = seen_rows(model, [UP], lambda: model(input_ids=ids, labels=labels), skip_last=True)
    expected = torch.ones(2, 7, dtype=torch.bool)
    expected[0, 4:] = False
    expected[1, 6] = False
    assert torch.equal(seen.kept(UP), expected)


@pytest.mark.parametrize("how", ["position_ids", "numbers", "cu_seq_lens"])
def test_documents_in_one_row_each_leave_out_their_last_position(how: str) -> None:
    model = llama(use_cache=False)
    ids = torch.randint(3, 50, (1, 9))
    extra: dict[str, Any] = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])}
    if how == "numbers":
        extra = {"attention_mask": torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 2]])}
    if how == "cu_seq_lens":
        extra = {"cu_seq_lens_q": torch.tensor([0, 4, 9], dtype=torch.int32)}
    expected = torch.ones(1, 9, dtype=torch.bool)
    expected[0, 3] = expected[0, 8] = False
    seen = seen_rows(model, [UP], lambda: model(input_ids=ids, **extra), skip_last=True)
    assert torch.equal(seen.kept(UP), expected)
    labels = ids.clone()
    labels[0, 4] = -100
    call = dict(input_ids=ids, labels=labels, **extra)
    seen = seen_rows(model, [UP], lambda: model(**call), skip_last=True)
    assert torch.equal(seen.kept(UP), expected)


def enc_dec(kind: str) -> tuple[nn.Module, list[str], list[str], list[str]]:
    """Return a model, and layers that read source, target, and the encoder's states."""
    from transformers import (
        BartConfig,
        BartForConditionalGeneration,
        T5Config,
        T5ForConditionalGeneration,
    )  # fmt: skip

    torch.manual_seed(0)
    if kind == "t5":
        model: nn.Module = T5ForConditionalGeneration(
            T5Config(
                vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
                decoder_start_token_id=0, dropout_rate=0.0,
            )
        )  # fmt: skip
        return (
            model,
            [
                "encoder.block.1.layer.1.DenseReluDense.wi",
                "encoder.block.0.layer.0.SelfAttention.q",
            ],
            [
                "decoder.block.1.layer.2.DenseReluDense.wi",
                "decoder.block.1.layer.1.EncDecAttention.q",
            ],
            ["decoder.block.1.layer.1.EncDecAttention.k"],
        )
    model = BartForConditionalGeneration(
        BartConfig(
            vocab_size=50, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, encoder_layers=1,
            decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, dropout=0.0,
            max_position_embeddings=64,
        )
    )  # fmt: skip
    return (
        model,
        ["model.encoder.layers.0.fc1"],
        ["model.decoder.layers.0.fc1", "model.decoder.layers.0.encoder_attn.q_proj"],
        ["model.decoder.layers.0.encoder_attn.k_proj"],
    )


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("length", [6, 4])
@pytest.mark.parametrize("given", ["labels", "labels and mask", "ids", "ids and mask"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_encoder_and_decoder_each_go_by_their_own(
    kind: str, length: int, given: str, recomputed: bool
) -> None:
    model, encoder, decoder, cross = enc_dec(kind)
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(2)
    source, target = torch.randint(3, 50, (2, 6)), torch.randint(3, 50, (2, length))
    mask, own = torch.ones_like(source), torch.ones_like(target)
    mask[0, 2:] = 0
    own[1, 3:] = 0
    call = dict(input_ids=source, attention_mask=mask)
    if "labels" in given:
        call["labels"] = target.masked_fill(own == 0, -100)
    else:
        call["decoder_input_ids"] = target
    if "mask" in given:
        call["decoder_attention_mask"] = own
    if given == "ids":
        own = torch.ones_like(own)
    seen = seen_rows(model.train(), [*encoder, *decoder, *cross], lambda: model(**call))
    for name in (*encoder, *cross):
        assert torch.equal(seen.kept(name), mask.bool()), name
    for name in decoder:
        assert torch.equal(seen.kept(name), own.bool()), name


@pytest.mark.parametrize("length", [7, 2])
@pytest.mark.parametrize("first", [False, True])
def test_torch_encoders_count_padding_by_their_own_polarity_and_layout(
    length: int, first: bool
) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=not first)
            self.emb = nn.Embedding(50, 16)
            self.enc = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.out = nn.Linear(16, 50)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            x = self.emb(input_ids)
            x = x.transpose(0, 1) if first else x
            y = self.enc(x, src_key_padding_mask=attention_mask == 0)
            return self.out(y.transpose(0, 1) if first else y)

    model = Encoder()
    ids = torch.randint(3, 50, (2, length))
    mask = torch.ones_like(ids)
    mask[0, 1:] = 0
    names = ["enc.layers.0.linear1", "enc.layers.1.linear2", "out"]
    seen = seen_rows(model, names, lambda: model(ids, mask))
    for name in names[:2]:
        assert torch.equal(seen.kept(name), mask.bool().T if first else mask.bool())
    assert torch.equal(seen.kept("out"), mask.bool())


def test_torch_transformer_has_two_streams_and_a_memory() -> None:
    model = nn.Transformer(16, 2, 1, 1, 24, 0.0, batch_first=True)
    source, target = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    pads, own = torch.zeros(2, 5, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.bool)
    pads[0, 3:], own[1, 2:] = True, True
    names = ["encoder.layers.0.linear1", "decoder.layers.0.linear1"]
    call = dict(src_key_padding_mask=pads, tgt_key_padding_mask=own)
    seen = seen_rows(model, names, lambda: model(source, target, **call))
    assert torch.equal(seen.kept(names[0]), ~pads)
    assert torch.equal(seen.kept(names[1]), ~own)


@pytest.mark.parametrize("length", [7, 2])
def test_one_row_a_sequence_counts(length: int) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SMALL))
    ids = torch.randint(3, 50, (2, length))
    mask = torch.ones_like(ids)
    mask[0, 1:] = 0
    names = ["bert.encoder.layer.0.intermediate.dense", "bert.pooler.dense", "classifier"]
    call = dict(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1]))
    seen = seen_rows(model, names, lambda: model(**call))
    assert torch.equal(seen.kept(names[0]), mask.bool())
    assert all(seen.kept(name).all() for name in names[1:])


def test_multiple_choice_flattens_its_mask() -> None:
    from transformers import BertConfig, BertForMultipleChoice

    model = BertForMultipleChoice(BertConfig(**SMALL))
    ids = torch.randint(3, 50, (2, 3, 5))
    mask = torch.ones_like(ids)
    mask[0, 1, 2:] = 0
    name = "bert.encoder.layer.0.intermediate.dense"
    call = dict(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1]))
    seen = seen_rows(model, [name, "classifier"], lambda: model(**call))
    assert torch.equal(seen.kept(name), mask.bool().flatten(0, 1))
    assert seen.kept("classifier").all()


def llava() -> nn.Module:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    text = {**SMALL, "model_type": "llama", "num_hidden_layers": 1, "num_key_value_heads": 2}
    vision = dict(
        model_type="clip_vision_model", hidden_size=16, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=2, image_size=16, patch_size=8,
    )  # fmt: skip
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=49)
    return LlavaForConditionalGeneration(config).train()


def test_of_a_vision_language_model_patches_count_and_text_by_its_mask() -> None:
    model = llava()
    ids = torch.randint(3, 48, (2, 7))
    ids[:, 1:5] = 49
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    found = [n for n, _ in model.named_modules()]
    text = next(n for n in found if n.endswith("language_model.layers.0.mlp.up_proj"))
    patches = next(n for n in found if n.endswith("layers.0.mlp.fc1"))
    projector = next(n for n in found if n.endswith("projector.linear_1"))
    call = dict(input_ids=ids, attention_mask=mask, pixel_values=torch.randn(2, 3, 16, 16))
    seen = seen_rows(model, [text, patches, projector], lambda: model(**call), skip_last=True)
    assert torch.equal(seen.kept(text), not_last(mask))
    assert seen.kept(patches).all()
    assert seen.kept(projector).all()


def test_frames_of_a_sound_go_by_the_mask_that_is_made_of_its_samples() -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    torch.manual_seed(0)
    model = Wav2Vec2ForCTC(
        Wav2Vec2Config(
            vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=24, conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3),
            num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, mask_time_prob=0.0,
        )
    )  # fmt: skip
    mask = torch.ones(2, 200, dtype=torch.long)
    mask[0, 120:] = 0
    call = dict(input_values=torch.randn(2, 200), attention_mask=mask)
    names = ["wav2vec2.encoder.layers.0.feed_forward.intermediate_dense", "lm_head"]
    seen = seen_rows(model, names, lambda: model(**call), skip_last=True)
    frames = model._get_feat_extract_output_lengths(mask.sum(-1)).tolist()
    expected = torch.arange(19) < torch.tensor(frames)[:, None]
    for name in names:
        assert torch.equal(seen.kept(name), expected)


def test_a_row_picked_of_each_sequence_counts_where_its_position_does() -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    model = CLIPTextModelWithProjection(CLIPTextConfig(**SMALL, projection_dim=8, eos_token_id=2))
    ids, mask, _ = padded()
    call = dict(input_ids=ids, attention_mask=mask)
    assert (
        seen_rows(model, ["text_projection"], lambda: model(**call)).kept("text_projection").all()
    )


def test_a_sound_encoder_has_no_padding_and_its_decoder_goes_by_labels() -> None:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=60, num_mel_bins=4, encoder_layers=1, decoder_layers=1, d_model=16,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
            decoder_ffn_dim=24, max_source_positions=10, max_target_positions=12,
            decoder_start_token_id=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    labels = torch.randint(3, 50, (2, 6))
    labels[0, 3:] = -100
    names = ["model.encoder.layers.0.fc1", "model.decoder.layers.0.fc1",
             "model.decoder.layers.0.encoder_attn.k_proj"]  # fmt: skip
    call = dict(input_features=torch.randn(2, 4, 20), labels=labels)
    seen = seen_rows(model, names, lambda: model(**call))
    assert seen.kept(names[0]).all()
    assert torch.equal(seen.kept(names[1]), labels != -100)
    assert seen.kept(names[2]).all()


class Experts(nn.Module):
    """A list of experts as remote code writes it."""

    def __init__(self, pick: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.router, self.head = nn.Embedding(50, 16), nn.Linear(16, 2), nn.Linear(16, 9)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 16)) for _ in range(2)
        )
        self.pick, self.recompute, self.routed = pick, False, {}

    def block(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 16)
        scores = self.router(flat).softmax(-1)
        to = scores.argmax(-1)
        y = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            places = torch.where(to == e)[0].flip(0)
            if self.pick == "mask":
                places = torch.where(to == e)[0]
                chosen = flat[to == e]
            elif self.pick == "none":
                chosen = flat[None, places].reshape(-1, 16)
            else:
                chosen = flat.index_select(0, places)
            self.routed[e] = places
            y = y.index_add(0, places, expert(chosen) * scores[places, e, None])
        return x + y.view_as(x)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.emb(input_ids) * 3
        x = checkpoint(self.block, x, use_reentrant=False) if self.recompute else self.block(x)
        return self.head(x)


@pytest.mark.parametrize("pick", ["mask", "none", "select"])
@pytest.mark.parametrize("recompute", [False, True])
def test_rows_routed_to_experts_in_a_list_are_known_by_their_index(
    pick: str, recompute: bool
) -> None:
    model, (ids, mask, _) = Experts(pick), padded(3)
    model.recompute = recompute
    names = [f"experts.{e}.{i}" for e in range(2) for i in (0, 2)] + ["router"]
    seen = seen_rows(model, names, lambda: model(ids, mask), skip_last=True)
    keep = not_last(mask).flatten()
    for name in names[:-1]:
        assert torch.equal(seen.kept(name), keep[model.routed[int(name.split(".")[1])]]), name
    assert torch.equal(seen.kept("router"), keep)


def test_unpadded_rows_are_known_by_their_index_and_by_their_number() -> None:
    class Unpadded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.up, self.head = nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor, early: bool) -> Tensor:
            real = attention_mask.bool()
            x = self.emb(input_ids[real]) if early else self.emb(input_ids)[real]
            return self.head(self.up(x))

    model, (ids, mask, _) = Unpadded(), padded()
    for early in (False, True):
        seen = seen_rows(model, ["up"], lambda: model(ids, mask, early), skip_last=True)  # noqa: B023
        assert torch.equal(seen.kept("up"), not_last(mask)[mask.bool()])


def test_what_nothing_explains_is_refused_by_name_with_the_streams_that_are_known() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.odd = nn.Embedding(50, 8), nn.Linear(8, 8)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            x = self.emb(input_ids)
            return self.odd(torch.cat([x, x.mean(1, keepdim=True)], 1).sin())

    model, (ids, mask, _) = Odd(), padded()
    seen = seen_rows(model, ["odd"], lambda: model(ids, mask))
    with pytest.raises(ShapeError, match=r"'odd' has \[2, 8\] rows.*\[2, 7\].*rows="):
        seen.kept("odd")


def test_a_raised_forward_leaves_nothing_behind() -> None:
    model, (ids, mask, _) = llama(), padded()
    layer = model.get_submodule(UP)
    streams = TokenStreams(model, [LinearLayer(UP, layer, 16, 24)])
    streams.attach()
    try:
        handle = layer.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(input_ids=ids, attention_mask=mask)
        assert streams.current() is None
        handle.remove()
        model(input_ids=ids, attention_mask=mask)
        assert streams.current() is None
    finally:
        streams.remove()


def test_a_told_mask_is_obeyed_for_positions_of_its_shape() -> None:
    model, (ids, mask, _) = llama(), padded()
    seen = seen_rows(model, [UP], lambda: model(input_ids=ids), skip_last=True, mask=mask.bool())
    assert torch.equal(seen.kept(UP), not_last(mask))
    assert seen.calls[UP][0][0].known(UP, ids.shape).how == "told"


def test_modules_whose_forward_can_tell_nothing_get_no_hook() -> None:
    model = llama()
    streams = TokenStreams(model, [LinearLayer(UP, model.get_submodule(UP), 16, 24)])
    assert model.model.layers[1].mlp not in streams._hooked
    assert model.model.layers[0] not in streams._hooked
    assert model.model in streams._hooked


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_counts_as_the_first_forward_did(reentrant: bool) -> None:
    model, (ids, mask, labels) = llama(), padded()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    call = dict(input_ids=ids, attention_mask=mask, labels=labels)
    seen = seen_rows(model, [UP], lambda: model(**call), skip_last=True)
    assert torch.equal(seen.kept(UP), not_last(mask))


def test_a_told_mask_of_no_known_positions_is_refused() -> None:
    model, (ids, _, _) = llama(), padded()
    told = torch.ones(3, 5, dtype=torch.bool)
    seen = seen_rows(model, [UP], lambda: model(input_ids=ids), mask=told)
    with pytest.raises(ShapeError, match=r"mask\(\) is \[3, 5\]"):
        seen.kept(UP)
