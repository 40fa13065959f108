"""What a forward takes is asked of the model: under other names, wrapped, hidden, or not at all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from cases import VOCABULARY, gpt2, llama, vit
from torch import Tensor, nn
from torch.nn.functional import one_hot

import curvfast
from curvfast.analysis import leading_matches
from curvfast.data.tokenizing import as_encoder
from curvfast.errors import InputError
from curvfast.evals.generation import greedy
from curvfast.model.forward import forward_of, logits_of, model_arguments


class Recurrent(nn.Module):
    """A causal model with a state, which knows no padding; it notes how much it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(VOCABULARY, VOCABULARY)
        with torch.no_grad():
            self.head.weight.normal_()
        self.read: list[int] = []

    def step(self, tokens: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        self.read.append(tokens.shape[1])
        state = torch.zeros(len(tokens), VOCABULARY) if state is None else state
        states = []
        for token in one_hot(tokens, VOCABULARY).float().unbind(1):
            state = 0.7 * state + token
            states.append(state)
        return self.head(torch.stack(states, 1)), state


@dataclass
class Cached:
    logits: Tensor
    cache: Tensor | None = None


class NamedCache(Recurrent):
    def forward(self, input_ids: Tensor, cache: Tensor | None = None, use_cache: bool = True):
        logits, state = self.step(input_ids, cache)
        return Cached(logits, state if use_cache else None)


class NamedState(Recurrent):
    def forward(self, input_ids, labels=None, state=None, **kwargs):
        logits, state = self.step(input_ids, state)
        return {"logits": logits, "state": state, "labels": torch.zeros(3)}


class NamedPast(Recurrent):
    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None):
        logits, state = self.step(input_ids, past_key_values)
        return SimpleNamespace(
            logits=logits, _asdict=lambda: {"logits": logits, "past_key_values": state}
        )


class Stateless(Recurrent):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.step(input_ids, None)[0]


class Unreturned(Recurrent):
    """Takes a cache, and keeps it to itself."""

    def forward(self, input_ids, cache=None, use_cache=True):
        return Cached(self.step(input_ids, None)[0])


def token_by_token(model: nn.Module, prompt: list[int], length: int) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(length):
            tokens.append(int(logits_of(model(torch.tensor([tokens])))[0, -1].argmax()))
    return tokens[len(prompt) :]


def prompts() -> list[list[int]]:
    return [torch.randint(1, VOCABULARY, (n,)).tolist() for n in (3, 7, 3, 5)]


@pytest.mark.parametrize("kind", [NamedCache, NamedState, NamedPast, Stateless, Unreturned])
def test_a_cache_is_what_is_returned_under_the_name_of_an_argument(kind: type[Recurrent]) -> None:
    model, texts = kind(), prompts()
    expected = [token_by_token(model, text, 5) for text in texts]
    model.read.clear()
    assert greedy(model, texts, 5) == expected
    carries = kind not in (Stateless, Unreturned)
    assert (model.read[1:5] == [1, 1, 1, 1]) == carries


def hidden(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Stand before a forward as a careless decorator does, without its signature."""
    return lambda *args, **kwargs: forward(*args, **kwargs)


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return self.module(*inputs, **kwargs)


class Adapted(nn.Module):
    """As PEFT's models are: some arguments named, the rest handed on, the model behind a method."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs: Any) -> Any:
        return self.base_model(
            input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs
        )


def replaced(model: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    model.forward = forward
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "data parallel": Wrapper,
    "peft": Adapted,
    "both": lambda model: Wrapper(Adapted(model)),
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "partial": lambda model: replaced(model, functools.partial(model.forward, use_cache=True)),
    "hidden": lambda model: replaced(model, hidden(model.forward)),
    "hidden and wrapped": lambda model: Wrapper(replaced(model, hidden(model.forward))),
    "decorated": lambda model: replaced(
        model, functools.wraps(model.forward)(hidden(model.forward))
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_takes_what_it_wraps_takes(wrapper: str) -> None:
    plain = llama()
    plain.get_output_embeddings().weight.data.mul_(20)
    texts, bare = prompts(), forward_of(plain)
    continued = greedy(plain, texts, 4)
    matches = leading_matches(plain, texts, continued)
    wrapped = WRAPPERS[wrapper](plain)
    found = forward_of(wrapped)
    assert (found.cached, found.generates) == (True, True)
    assert found.names >= bare.names
    assert found.first() == "input_ids"
    ids = torch.tensor(texts[:1])
    assert found.bind((ids,), {"labels": ids}).keys() == {"input_ids", "labels"}
    assert model_arguments(wrapped, ids, ids.device).keys() == {"input_ids", "use_cache"}
    torch._dynamo.reset()
    assert greedy(wrapped, texts, 4) == continued
    assert leading_matches(wrapped, texts, continued) == matches == [4, 4, 4, 4]


def causal(family: str, **changes: Any) -> nn.Module:
    sizes = {
        "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**{**sizes, **changes})
    kind = getattr(transformers, f"{family}ForCausalLM", None)
    kind = kind or getattr(transformers, f"{family}LMHeadModel")
    return kind(config)


FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mamba": {},  # a recurrent state; no positions
    "Rwkv": {"attention_hidden_size": 24},  # no mask either; its state is right of one text alone
    "Bloom": {"n_layer": 2, "n_head": 4},  # positions by the mask
    "OpenAIGPT": {"n_embd": 24, "n_layer": 2, "n_head": 2},  # no cache
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2},  # use_cache in **kwargs
    "Bart": {"d_model": 24, "decoder_layers": 1, "decoder_attention_heads": 2},  # no positions
}


@pytest.mark.parametrize("family", FAMILIES)
def test_unequal_prompts_are_continued_as_each_alone(family: str) -> None:
    model, texts = causal(family, **FAMILIES[family]).eval(), prompts()
    # Logits of a fresh model nearly tie; a sharper head makes rounding harmless.
    model.get_output_embeddings().weight.data.mul_(20)
    expected = [token_by_token(model, text, 4) for text in texts]
    assert greedy(model, texts, 4, batch_size=1 if family == "Rwkv" else 32) == expected
    assert leading_matches(model, texts, expected) == [4, 4, 4, 4]


def test_a_model_that_mixes_the_texts_of_a_batch_is_refused() -> None:
    class Mixing(NamedCache):
        def forward(self, input_ids, cache=None):
            found = super().forward(input_ids, cache)
            if cache is not None:
                # A state without its axis of tokens, beside one that has it.
                found.logits = found.logits + found.logits.squeeze(1)
            return found

    greedy(Mixing(), prompts(), 3, batch_size=1)
    with pytest.raises(InputError, match="mixes texts"):
        greedy(Mixing(), prompts(), 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_cache_is_made_where_none_is_wanted(family: str) -> None:
    model = causal(family, **FAMILIES[family]).eval()
    arguments = model_arguments(model, {"input_ids": torch.tensor(prompts()[:1])}, model.device)
    found = forward_of(model).carried(model(**arguments), arguments)
    assert not found, f"{list(found)} returned"


def test_what_a_model_is_not_told_to_leave_it_is_not_given() -> None:
    assert forward_of(vit()).uncached == {}
    assert forward_of(nn.Linear(2, 2)).uncached == {}
    given = {"input_ids": 1, "use_cache": True}
    assert model_arguments(llama(), given, torch.device("cpu")) == given


def test_arguments_that_are_handed_on_are_found_under_any_name() -> None:
    class Model(nn.Module):
        def forward(self, x, *rest, scale=1, **anything):
            return x

    forward = forward_of(Model())
    assert forward.bind((1, 2), {"scale": 3, "labels": 4}) == {
        "x": 1, "rest": (2,), "scale": 3, "labels": 4
    }  # fmt: skip
    assert forward_of(nn.Linear(2, 2)).bind((1, 2, 3), {}) == {}


@pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")
def test_labels_of_a_call_through_a_wrapper_are_counted() -> None:
    plain, ids = llama(), torch.randint(1, VOCABULARY, (2, 9))
    labels = ids.masked_fill(ids < 20, -100)
    found = []
    for model in (plain, Wrapper(plain)):
        with curvfast.collect(model, "all") as curvature:
            model(ids, labels=labels).loss.backward()
        found.append({n.removeprefix("module."): f.g_sum for n, f in curvature.factors().items()})
    first, second = found
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def encoder_decoder() -> nn.Module:
    config = transformers.T5Config(
        d_model=24, d_kv=6, d_ff=16, num_layers=1, num_heads=4, vocab_size=VOCABULARY
    )
    return transformers.T5ForConditionalGeneration(config)


def masked() -> nn.Module:
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            hidden_size=24, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
            vocab_size=VOCABULARY,
        )
    )  # fmt: skip


def classifier() -> nn.Module:
    return transformers.LlamaForSequenceClassification(llama(pad_token_id=0).config)


@pytest.mark.parametrize("model", [encoder_decoder, masked, classifier, vit])
def test_what_continues_no_text_is_refused(model: Callable[[], nn.Module]) -> None:
    with pytest.raises(InputError, match="cannot generate"):
        greedy(model(), [[1, 2, 3]], 2)


def test_a_forward_that_names_nothing_is_given_no_bare_tensor() -> None:
    class Model(nn.Module):
        def forward(self, *args, **kwargs):
            return kwargs["input_ids"]

    ids = torch.ones(1, 2, dtype=torch.long)
    with pytest.raises(InputError, match="does not tell what its forward reads"):
        model_arguments(Model(), ids, ids.device)
    assert model_arguments(Model(), {"input_ids": ids}, ids.device).keys() == {"input_ids"}


@pytest.mark.parametrize("takes_verbose", [True, False])
def test_a_tokenizer_is_told_to_be_quiet_if_it_knows_how(takes_verbose: bool) -> None:
    seen: list[dict[str, Any]] = []

    class Tokenizer:
        eos_token_id = 0

        def encode(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
            seen.append(options)
            return {"input_ids": [[len(text)] for text in texts]}

    class Quiet(Tokenizer):
        __call__ = hidden(Tokenizer.encode)

    class Plain(Tokenizer):
        def __call__(self, texts: list[str], add_special_tokens: bool) -> Any:
            return self.encode(texts, add_special_tokens=add_special_tokens)

    encoder = as_encoder(Quiet() if takes_verbose else Plain())
    assert encoder.encode(["a", "bcd"]) == [[1], [3]]
    quiet = {"verbose": False} if takes_verbose else {}
    assert seen == [{"add_special_tokens": False, **quiet}]


def test_gpt2_carries_what_it_returns() -> None:
    forward, model = forward_of(gpt2()), gpt2()
    (name,) = forward.carried(model(torch.ones(1, 2, dtype=torch.long)), {"input_ids": None})
    assert name in ("past_key_values", "cache")
