"""Gradients of single examples in an eigenbasis, against autograd one example at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import VOCABULARY, gpt2
from torch import Tensor, nn

from curvfast import Eigenbasis, collect_from, select
from curvfast.analysis import GradientEnergies, gradient_energies
from curvfast.collection.likelihood import fisher_gradient
from curvfast.errors import BasisMismatch, CoverageError, InputError

# Fewer rows than the layers are wide: their factors lack rank, which is of no matter here.
pytestmark = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")


class Pictures(nn.Module):
    """Classifies pictures [n, 6]; a third layer is beside the way."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.first, self.mid = nn.Linear(6, 6), nn.Linear(6, 6)
        self.drop, self.last, self.idle = nn.Dropout(0.5), nn.Linear(6, 3), nn.Linear(6, 3)
        self.twice = twice

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = torch.tanh(self.mid(torch.tanh(self.first(pixels))))
        if self.twice:
            hidden = torch.tanh(self.mid(hidden))
        return self.last(self.drop(hidden))


def pictures(count: int = 40) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 6, generator=generator)
    return {"pixels": pixels, "labels": torch.arange(count) % 3}


def measured(model: nn.Module, batches: list[Any], layers: Any) -> Eigenbasis:
    return collect_from(model, batches, layers, progress=False).eigh()


@pytest.fixture
def classifier() -> tuple[nn.Module, Eigenbasis]:
    torch.manual_seed(0)
    model = Pictures()
    return model, measured(model, [pictures()], ["first", "last"])


def rotated(model: nn.Module, basis: Eigenbasis, loss: Tensor) -> dict[str, Tensor]:
    """Return C of each layer, float64."""
    modules = dict(model.named_modules())
    gradients = torch.autograd.grad(loss, [modules[name].weight for name in basis])
    found = {}
    for (name, own), gradient in zip(basis.items(), gradients, strict=True):
        # GPT-2 stores its weights as [d_in, d_out].
        matrix = gradient.double() if gradient.shape == own.shape else gradient.double().T
        found[name] = own.vectors_g.double().T @ matrix @ own.vectors_a.double()
    return found


def expected(basis: Eigenbasis, kept: Any, c: dict[str, Tensor]) -> Tensor:
    """Return energy, flat and curved of one example, [layers, 3]."""
    lines = []
    for name, own in basis.items():
        squares = c[name].square()
        products = own.values_g[:, None] * own.values_a
        flat = squares[~kept[name].dense()].sum()
        lines.append(torch.stack([squares.sum(), flat, (squares * products).sum()]))
    return torch.stack(lines)


def stacked(found: GradientEnergies) -> Tensor:
    return torch.stack([found.energy, found.flat, found.curved], dim=2)


@pytest.mark.parametrize("importance", ["kfac", "random"])
def test_texts_have_the_energies_of_their_own_gradients(importance: str) -> None:
    torch.manual_seed(0)
    model = gpt2()
    ids = torch.randint(VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(4, 7, dtype=torch.long)
    mask[2, 4:] = 0
    labels = ids.masked_fill(torch.arange(7) < 3, -100)
    batches = [
        {"input_ids": ids[:3], "attention_mask": mask[:3], "labels": labels[:3]},
        {"input_ids": ids[3:], "attention_mask": mask[3:], "labels": labels[3:]},
    ]
    basis = measured(model, [{"input_ids": ids}], ["*.1.mlp.c_fc", "*.0.attn.c_attn"])
    kept = select(model, basis, importance, fraction=0.4)
    found = gradient_energies(model, basis, kept, batches, labels="gold", progress=False)
    assert found.layers == tuple(basis)
    model.eval()
    exact = []
    for i in range(4):
        real = int(mask[i].sum())
        logits = model(input_ids=ids[i : i + 1, :real]).logits[0]
        loss = nn.functional.cross_entropy(
            logits[:-1], labels[i, 1:real], ignore_index=-100, reduction="sum"
        )
        exact.append(expected(basis, kept, rotated(model, basis, loss)))
    torch.testing.assert_close(stacked(found), torch.stack(exact), rtol=1e-4, atol=1e-10)
    assert found.energy.dtype == torch.float64


def test_per_position_energies_add_and_per_sequence_gradients_do() -> None:
    torch.manual_seed(0)
    model = gpt2()
    ids = torch.randint(VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(2))
    basis = measured(model, [{"input_ids": ids}], ["*.1.mlp.c_proj"])
    kept = basis.keep(mass=0.7)
    found = gradient_energies(model, basis, kept, [ids], labels="gold", per="position")
    model.eval()
    (own,) = basis.values()
    seen: list[Tensor] = []
    layer = model.transformer.h[1].mlp.c_proj
    handle = layer.register_forward_hook(lambda _m, args, y: seen.extend((args[0], y)))
    for i in range(3):
        seen.clear()
        logits = model(input_ids=ids[i : i + 1]).logits[0]
        loss = nn.functional.cross_entropy(logits[:-1], ids[i, 1:], reduction="sum")
        (g,) = torch.autograd.grad(loss, seen[1])
        p = (g[0].double() @ own.vectors_g.double()).square()
        q = (seen[0][0].detach().double() @ own.vectors_a.double()).square()
        squares = p.T @ q
        removed = ~kept[next(iter(basis))].dense()
        curved = own.values_g @ squares @ own.values_a
        exact = torch.stack([squares.sum(), squares[removed].sum(), curved])
        torch.testing.assert_close(stacked(found)[i, 0], exact, rtol=1e-4, atol=1e-10)
    handle.remove()


def test_the_fisher_of_an_example_is_the_mean_over_its_predicted_labels(
    classifier: tuple[nn.Module, Eigenbasis],
) -> None:
    model, basis = classifier
    kept, batch = basis.keep(mass=0.6), pictures(5)
    found = gradient_energies(model, basis, kept, [batch], draws=600, progress=False)
    model.eval()
    exact = []
    for pixels in batch["pixels"]:
        logits = model(pixels[None])[0]
        total = torch.zeros(len(basis), 3, dtype=torch.float64)
        for label, p in enumerate(logits.softmax(0).tolist()):
            loss = nn.functional.cross_entropy(model(pixels[None]), torch.tensor([label]))
            total += p * expected(basis, kept, rotated(model, basis, loss))
        exact.append(total)
    torch.testing.assert_close(stacked(found), torch.stack(exact), rtol=0.08, atol=1e-4)


def test_the_random_gradient_has_the_moments_of_labels_drawn_from_the_prediction() -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, -9.0]).expand(60_000, 4)
    targets = torch.zeros(60_000, dtype=torch.long)
    g = fisher_gradient(logits, targets, torch.Generator().manual_seed(0)).double()
    p = logits[0].double().softmax(0)
    rare = float(p[3])
    torch.testing.assert_close(g.mean(0), torch.zeros(4).double(), rtol=0, atol=0.01)
    second = g.T @ g / len(g)
    torch.testing.assert_close(second, p.diag() - p.outer(p), rtol=0.03, atol=1e-3)
    # A label that 60,000 draws would hardly show has its share of every gradient.
    assert float(second[3, 3]) == pytest.approx(rare * (1 - rare), rel=0.03)


def test_positions_without_a_label_have_no_fisher() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[1, -100, 2], [-100, -100, 4]])
    g = fisher_gradient(logits, targets, torch.Generator().manual_seed(0))
    assert torch.equal(g.ne(0).any(-1), targets.ne(-100))
    assert g.dtype == logits.dtype


def test_shares_and_curvatures_are_over_all_layers() -> None:
    energy = torch.tensor([[3.0, 1.0], [0.0, 0.0]]).double()
    found = GradientEnergies(("a", "b"), energy, energy * 0.5, energy * torch.tensor([2.0, 6.0]))
    assert found.sharpness().tolist() == [4, 0]
    assert found.flat_share().tolist() == [0.5, 0]
    assert found.population_curvature().tolist() == [3, 0]


def test_what_is_kept_whole_has_no_flat_share_and_curvature_is_between_its_extremes(
    classifier: tuple[nn.Module, Eigenbasis],
) -> None:
    model, basis = classifier
    whole = gradient_energies(model, basis, basis.keep(fraction=1.0), [pictures()])
    none = gradient_energies(model, basis, basis.keep(fraction=0.0), [pictures()])
    assert whole.flat_share().tolist() == [0] * 40
    torch.testing.assert_close(none.flat_share(), torch.ones(40).double())
    top = max(float(basis[name].values_g[0] * basis[name].values_a[0]) for name in basis)
    assert 0 < whole.population_curvature().min() <= whole.population_curvature().max() < top


def test_the_population_has_as_much_flat_energy_as_its_edit_removes(
    classifier: tuple[nn.Module, Eigenbasis],
) -> None:
    model, basis = classifier
    basis = Eigenbasis({"last": basis["last"]})
    kept = basis.keep(fraction=0.5)
    found = gradient_energies(model, basis, kept, [pictures()], draws=100)
    share = float(found.flat.sum() / found.energy.sum())
    # K-FAC takes a and g for independent, which they are not quite.
    assert share == pytest.approx(1 - kept["last"].mass, abs=0.06)


def test_the_model_and_the_random_state_are_as_before(
    classifier: tuple[nn.Module, Eigenbasis],
) -> None:
    model, basis = classifier
    model.train()
    model.mid.weight.requires_grad_(False)
    frozen = [p.requires_grad for p in model.parameters()]
    model.first.weight.grad = torch.ones(6, 6)
    state = torch.get_rng_state()
    for labels in ("gold", "fisher"):
        gradient_energies(model, basis, basis.keep(mass=0.5), [pictures()], labels=labels)
    with pytest.raises(InputError):
        gradient_energies(model, basis, basis.keep(mass=0.5), [{"pixels": torch.zeros(2, 6)}])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == frozen
    assert torch.equal(model.first.weight.grad, torch.ones(6, 6))
    assert sum(p.grad is not None for p in model.parameters()) == 1
    assert not any(module._forward_hooks for module in model.modules())


def test_a_seed_repeats_and_batches_join_in_order(
    classifier: tuple[nn.Module, Eigenbasis],
) -> None:
    model, basis = classifier
    kept, batch = basis.keep(mass=0.5), pictures(6)
    one = gradient_energies(model, basis, kept, [batch], draws=2)
    assert torch.equal(
        stacked(one), stacked(gradient_energies(model, basis, kept, [batch], draws=2))
    )
    other = gradient_energies(model, basis, kept, [batch], draws=2, seed=1)
    assert not torch.equal(one.energy, other.energy)
    parts = [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2, 4)]
    whole, pieces = (
        gradient_energies(model, basis, kept, batches, labels="gold")
        for batches in ([batch], parts)
    )
    torch.testing.assert_close(stacked(whole), stacked(pieces))


def test_what_cannot_be_measured_is_said(classifier: tuple[nn.Module, Eigenbasis]) -> None:
    model, basis = classifier
    kept, batches = basis.keep(mass=0.5), [pictures()]

    def refused(error: type[Exception], match: str, *args: Any, **options: Any) -> None:
        with pytest.raises(error, match=match):
            gradient_energies(*args, **options)
        assert not any(module._forward_hooks for module in model.modules())

    refused(InputError, "labels='sampled'", model, basis, kept, batches, labels="sampled")
    refused(InputError, "per='token'", model, basis, kept, batches, per="token")
    refused(InputError, "one draw", model, basis, kept, batches, draws=0)
    refused(InputError, "no example", model, basis, kept, [])
    refused(InputError, "frame|pairs", model, basis, replace(kept, frame="singular"), batches)
    cut = replace(basis["first"], vectors_a=basis["first"].vectors_a[:, :2])
    leading = Eigenbasis({"first": cut})
    refused(InputError, "leading eigenvectors", model, leading, kept, batches)
    refused(BasisMismatch, "lacks", nn.Linear(6, 3), basis, kept, batches)


def test_a_layer_called_twice_or_never_is_refused(
    classifier: tuple[nn.Module, Eigenbasis],
) -> None:
    model, basis = classifier
    mid = Eigenbasis({"mid": basis["first"]})
    torch.manual_seed(0)
    with pytest.raises(CoverageError, match="called twice"):
        gradient_energies(Pictures(twice=True), mid, mid.keep(mass=0.5), [pictures()])
    idle = Eigenbasis({"idle": basis["last"]})
    for layers in (idle, Eigenbasis({**idle.layers, **mid.layers})):
        with pytest.raises(CoverageError, match="'idle' arrived"):
            gradient_energies(model, layers, layers.keep(mass=0.5), [pictures()])
