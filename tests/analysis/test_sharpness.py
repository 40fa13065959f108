"""Curvature around inputs, against Hessians formed whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import VOCABULARY, gpt2
from torch import Tensor, nn

from curvfast.analysis import example_losses, input_curvature
from curvfast.analysis.sharpness import squared_curvature
from curvfast.errors import InputError

H = 1e-6


class Pictures(nn.Module):
    """Classifies pictures [n, 1, 3, 3] smoothly."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(9, 8), nn.Dropout(0.5), nn.Linear(8, 4)

    def forward(self, pixels: Tensor, scale: float = 1.0) -> Tensor:
        return self.last(self.drop(torch.tanh(self.first(scale * pixels.flatten(1)))))


class Twice(nn.Module):
    """Reads its tokens through one embedding twice, or never."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.embedding, self.times = nn.Embedding(VOCABULARY, 4), times

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor) -> Tensor:
        rows = self.embedding.weight[input_ids].mean(1)
        for _ in range(self.times):
            rows = rows + self.embedding(input_ids).mean(1)
        return rows


def signs(seed: int, probes: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(0, 2, shape, generator=generator) for _ in range(probes))
    return [2.0 * draw.double() - 1 for draw in draws]


def whole(loss: Any, x: Tensor, probes: list[Tensor]) -> Tensor:
    """Return mean ‖Hv‖² of each example, H formed whole."""
    found = []
    for i in range(len(x)):
        hessian = torch.func.hessian(lambda at, i=i: loss(at, i))(x[i]).detach()
        hessian = hessian.reshape(x[i].numel(), -1)
        found.append(torch.stack([(hessian @ v[i].flatten()).square().sum() for v in probes]))
    return torch.stack(found).mean(1)


def tokens(*, padded: bool = False) -> dict[str, Tensor]:
    ids = torch.randint(VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 5, dtype=torch.long)
    if padded:
        mask[1, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def language_model() -> nn.Module:
    torch.manual_seed(0)
    model = gpt2().double()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        # From embeddings as small as at the start, the first normalisation bends all the rest.
        model.get_input_embeddings().weight.mul_(20)
    return model


@pytest.mark.parametrize("h", [1e-3, 2.0])
def test_of_a_quadratic_loss_it_is_exact_for_any_step(h: float) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(2, 6, 6, dtype=torch.float64)
    matrices = matrices + matrices.mT
    x = torch.randn(2, 6, dtype=torch.float64)

    def gradient(at: Tensor) -> Tensor:
        return torch.einsum("nij,nj->ni", matrices, at)

    generator = torch.Generator().manual_seed(3)
    found = squared_curvature(gradient, x, probes=4, h=h, generator=generator)
    exact = [torch.einsum("nij,nj->ni", matrices, v).square().sum(1) for v in signs(3, 4, 2, 6)]
    torch.testing.assert_close(found, torch.stack(exact).mean(0), rtol=1e-6, atol=0)
    many = squared_curvature(gradient, x, probes=3000, h=h, generator=generator)
    torch.testing.assert_close(many, matrices.square().sum((1, 2)), rtol=0.05, atol=0)


def test_of_pictures_it_is_the_squared_hessian_of_the_loss_of_the_given_label() -> None:
    torch.manual_seed(0)
    model, pixels = Pictures().double(), torch.randn(5, 1, 3, 3).double()
    labels = torch.tensor([0, 3, 1, 2, 2])
    batch = {"pixels": pixels, "labels": labels, "scale": 2.0}
    found = input_curvature(model, [batch], probes=3, h=H, seed=7)
    own = example_losses(model, [batch])
    model.eval()

    def loss(x: Tensor, i: int) -> Tensor:
        return nn.functional.cross_entropy(model(x[None], scale=2.0), labels[i : i + 1])

    exact = whole(loss, pixels, signs(7, 3, *pixels.shape))
    torch.testing.assert_close(found.curvature, exact, rtol=1e-4, atol=1e-9)
    losses = torch.stack([loss(x, i) for i, x in enumerate(pixels)]).detach()
    torch.testing.assert_close(found.loss, losses)
    torch.testing.assert_close(own, losses)


@pytest.mark.parametrize("labelled", [False, True])
def test_of_texts_it_is_that_of_their_embeddings(language_model: nn.Module, labelled: bool) -> None:
    batch = tokens(padded=not labelled)
    if labelled:
        # Half the text is a prompt.
        batch["labels"] = batch["input_ids"].masked_fill(torch.arange(5) < 3, -100)
    found = input_curvature(language_model, [batch], probes=2, h=H, seed=1)
    x = language_model.get_input_embeddings()(batch["input_ids"]).detach()

    def loss(at: Tensor, i: int) -> Tensor:
        real = int(batch["attention_mask"][i].sum())
        first = 3 if labelled else 1
        out = language_model(inputs_embeds=at[None, :real]).logits[0]
        return nn.functional.cross_entropy(
            out[first - 1 : real - 1], batch["input_ids"][i, first:real]
        )

    exact = whole(loss, x, signs(1, 2, *x.shape))
    torch.testing.assert_close(found.curvature, exact, rtol=1e-4, atol=1e-9)
    losses = torch.stack([loss(each, i) for i, each in enumerate(x)]).detach()
    torch.testing.assert_close(found.loss, losses)
    torch.testing.assert_close(example_losses(language_model, [batch]), losses)


def test_batches_join_in_order_and_a_seed_repeats(language_model: nn.Module) -> None:
    batch = tokens()
    parts = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(3)]
    one = input_curvature(language_model, [batch], probes=1)
    two = input_curvature(language_model, parts, probes=1)
    torch.testing.assert_close(one.loss, two.loss)
    again = input_curvature(language_model, parts, probes=1)
    assert torch.equal(two.curvature, again.curvature)
    other = input_curvature(language_model, parts, probes=1, seed=5)
    assert (two.curvature != other.curvature).all()


def test_embeddings_may_be_given_themselves(language_model: nn.Module) -> None:
    batch = tokens()
    embeds = language_model.get_input_embeddings()(batch["input_ids"]).detach()
    one = input_curvature(language_model, [batch], h=H)
    two = input_curvature(
        language_model, [{"inputs_embeds": embeds, "labels": batch["input_ids"]}], h=H
    )
    torch.testing.assert_close(one.curvature, two.curvature, rtol=1e-5, atol=1e-9)


def test_the_model_and_the_random_state_are_as_before(language_model: nn.Module) -> None:
    model = language_model.train()
    model.transformer.ln_f.weight.requires_grad_(False)
    frozen = [p.requires_grad for p in model.parameters()]
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    state = torch.get_rng_state()
    input_curvature(model, [tokens()], probes=2)
    example_losses(model, [tokens()])
    with pytest.raises(InputError):
        input_curvature(model, [{**tokens(), "labels": torch.full((3, 5), -100)}])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == frozen
    first, *rest = (p.grad for p in model.parameters())
    assert torch.equal(first, torch.ones_like(first))
    assert rest == [None] * len(rest)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("batch", "options", "match"),
    [
        (tokens(), {"probes": 0}, "at least one probe"),
        (tokens(), {"h": 0.0}, "positive step"),
        (tokens(), {"h": float("nan")}, "positive step"),
        (None, {}, "no example"),
        ({**tokens(), "labels": torch.full((3, 5), -100)}, {}, "example 0 of a batch has no"),
        ({"attention_mask": torch.ones(3, 5).long()}, {}, "which is the input"),
    ],
)
def test_what_cannot_be_measured_is_said(
    language_model: nn.Module, batch: Any, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(InputError, match=match):
        input_curvature(language_model, [] if batch is None else [batch], **options)


@pytest.mark.parametrize(("times", "match"), [(2, "twice in one forward"), (0, "without calling")])
def test_an_embedding_called_otherwise_than_once_is_refused(times: int, match: str) -> None:
    model = Twice(times)
    batch = {"input_ids": tokens()["input_ids"], "labels": torch.zeros(3, dtype=torch.long)}
    with pytest.raises(InputError, match=match):
        input_curvature(model, [batch])
    assert not model.embedding._forward_hooks


def test_tokens_without_an_embedding_and_labels_without_a_batch_are_refused() -> None:
    with pytest.raises(InputError, match="get_input_embeddings"):
        input_curvature(Pictures(), [{"input_ids": torch.zeros(1, 2, dtype=torch.long)}])
    with pytest.raises(InputError, match="no 'labels'"):
        input_curvature(Pictures(), [torch.zeros(1, 1, 3, 3)])
