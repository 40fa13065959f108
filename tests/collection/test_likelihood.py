"""What collect_from knows of a head: its likelihood, its labels, and where they are."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import llama, token_batches
from torch import Tensor, nn
from torch.nn import functional as F

import curvfast
from curvfast.collection.head import Said, likelihood_of
from curvfast.collection.likelihood import BERNOULLI, NORMAL, SOFTMAX, Likelihood
from curvfast.errors import CoverageError, InputError, NumericalWarning, ShapeError
from curvfast.kfac.known import CONVENTION, PROVEN, TOLD
from curvfast.model.identity import causal_convention
from curvfast.model.rows import AllRows, ChosenRows

pytestmark = pytest.mark.filterwarnings("ignore:.*rank-deficient")

_BERT = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "initializer_range": 0.3, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


_SINGLE, _MULTI = "single_label_classification", "multi_label_classification"


def run(model: nn.Module, batches: Any, layers: Any = "mlp", **options: Any) -> Any:
    return curvfast.collect_from(model, batches, layers, progress=False, **options)


def bert(head: str, **facts: Any) -> nn.Module:
    import transformers

    return getattr(transformers, f"BertFor{head}")(transformers.BertConfig(**_BERT, **facts))


def tokens(sequences: int = 2, length: int = 5) -> Tensor:
    return torch.randint(4, 50, (sequences, length))


def mlp(outputs: int, squeezed: bool = False) -> nn.Module:
    body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs))
    return nn.Sequential(body, nn.Flatten(0)) if squeezed else body


def gradients_of(model: nn.Module, name: str, loss: Callable[[], Tensor]) -> Tensor:
    """Return the gradient of a loss at a layer's output, as [rows, d_out] in float64."""
    seen: list[Tensor] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_hook(lambda _m, _a, y: seen.append(y))
    total = loss()
    handle.remove()
    (g,) = torch.autograd.grad(total, seen)
    return g.double().flatten(0, -2)


# ---- gradients of each likelihood ---------------------------------------------------------------


def fisher(name: str, f: Tensor) -> Tensor:
    """Return the Fisher of one prediction's outputs [K], by its definition."""
    if name == SOFTMAX:
        p = f.softmax(0)
        return p.diag() - torch.outer(p, p)
    return (f.sigmoid() * (1 - f.sigmoid())).diag() if name == BERNOULLI else torch.eye(len(f))


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("name", [SOFTMAX, BERNOULLI, NORMAL])
def test_drawn_labels_have_the_second_moment_of_the_fisher(name: str, axis: int) -> None:
    if name != SOFTMAX and axis == 1:
        pytest.skip("of classes alone")
    rows, f = 20_000, torch.tensor([0.7, -1.1, 0.2])
    outputs = f.expand(rows // 2, 2, 3).movedim(-1, axis).clone()
    likelihood = Likelihood(name, "", TOLD, axis)
    own, count = likelihood.sampled(outputs, AllRows(rows), torch.Generator().manual_seed(5))
    g = own.movedim(axis, -1).reshape(rows, 3)
    assert count == rows
    # Hoeffding for products in [-1, 1]: above .05 with chance 2 exp(-25); of a normal, 7 sigma.
    bound = 7 * math.sqrt(2 / rows) if name == NORMAL else 0.05
    assert (g.T @ g / rows - fisher(name, f)).abs().max() < bound
    assert g.mean(0).abs().max() < bound


@pytest.mark.parametrize("kept", [None, [0, 3]])
@pytest.mark.parametrize(
    "case", ["classes", "classes second", "soft", "bernoulli", "normal", "squeezed", "integers"]
)
def test_given_labels_have_the_gradient_of_torchs_own_loss(case: str, kept: Any) -> None:
    name, axis = SOFTMAX, -1
    f = torch.randn(4, 3)
    y: Tensor = torch.randint(3, (4,))
    y[1] = -100
    loss: Callable[..., Tensor] = F.cross_entropy
    if case == "classes second":
        axis, f, y = 1, torch.randn(2, 3, 2), torch.tensor([[0, -100], [1, 2]])
    elif case == "soft":
        y = torch.rand(4, 3).softmax(-1)
    elif case == "bernoulli":
        name, y, loss = BERNOULLI, torch.rand(4, 3).round(), F.binary_cross_entropy_with_logits
    elif case in ("normal", "squeezed", "integers"):
        name = NORMAL
        f = torch.randn(4, 1) if case != "normal" else f
        y = torch.randn(f.shape) if case != "integers" else torch.randint(9, f.shape)
        y = y.squeeze(-1) if case == "squeezed" else y
        loss = lambda f, y, reduction: 0.5 * (f - y.reshape(f.shape)).square().sum()  # noqa: E731
    rows = AllRows(4) if kept is None else ChosenRows(torch.tensor(kept))
    leaf = f.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, y, reduction="sum"), leaf)
    if kept is not None:
        flat = expected.movedim(axis, -1).reshape(4, -1)
        flat[[1, 2]] = 0
        expected = flat.view(expected.movedim(axis, -1).shape).movedim(-1, axis)
    found, count = Likelihood(name, "", TOLD, axis).gold(f.clone(), y, rows)
    torch.testing.assert_close(found, expected)
    ignored = {i for i, label in enumerate(y.flatten().tolist()) if label == -100}
    assert count == len(set(range(4) if kept is None else kept) - ignored)


@pytest.mark.parametrize("sequences", [1, 2])
@pytest.mark.parametrize("labels", [2, 3])
def test_the_exact_fisher_is_the_mean_over_every_labelling(sequences: int, labels: int) -> None:
    model, ids = bert("TokenClassification", num_labels=labels).eval(), tokens(sequences, 3)
    name = "bert.encoder.layer.0.intermediate.dense"
    found = run(model, [{"input_ids": ids}], [name], labels="exact")[name]
    expected = torch.zeros(24, 24, dtype=torch.float64)
    for one in ids[:, None]:
        logp = model(input_ids=one).logits[0].log_softmax(-1).detach()
        for y in itertools.product(range(labels), repeat=3):
            chosen = torch.tensor(y)
            weight = logp.gather(1, chosen[:, None]).sum().exp()
            g = gradients_of(
                model,
                name,
                lambda one=one, y=chosen: F.cross_entropy(
                    model(input_ids=one).logits[0], y, reduction="sum"
                ),
            )
            expected += weight * g.T @ g
    assert found.rows_a == found.rows_g == ids.numel()
    assert (found.g_sum - expected).norm() < 1e-5 * expected.norm()
    drawn = run(model, [{"input_ids": ids}], [name])[name]
    assert torch.equal(found.a_sum, drawn.a_sum)


@pytest.mark.parametrize(("name", "outputs"), [(BERNOULLI, 3), (NORMAL, 2), (NORMAL, 1)])
def test_drawn_labels_average_to_the_exact_fisher(name: str, outputs: int) -> None:
    model, x = mlp(outputs), torch.randn(4, 6)
    exact = run(model, [x], "*", labels="exact", likelihood=name)["0"]
    drawn = [run(model, [x], "*", likelihood=name, seed=s)["0"] for s in range(400)]
    traces = torch.tensor([float(each.g_sum.trace()) for each in drawn])
    assert exact.rows_g == drawn[0].rows_g == 4
    assert torch.equal(exact.a_sum, drawn[0].a_sum)
    # Six standard errors of their mean.
    assert abs(traces.mean() - exact.g_sum.trace()) < 6 * traces.std() / math.sqrt(len(traces))


@pytest.mark.parametrize("options", [{"rows_per_step": 3, "seed": 2}, {"marginals": True}])
def test_exact_labels_count_the_same_rows_in_every_pass(options: Any) -> None:
    model, x = mlp(3), torch.randn(7, 6)
    found = run(model, [x], "*", labels="exact", **options)["2"]
    rows = 3 if "rows_per_step" in options else 7
    assert found.rows_a == found.rows_g == rows
    p = model(x).softmax(-1).detach()
    if rows == 7:
        every = sum(fisher(SOFTMAX, f) for f in model(x).detach())
        assert (found.g_sum - every).norm() < 1e-5 * every.norm()
        a = model[:2](x).detach()
        size = (p * (1 - p)).sum(-1)  # E‖g‖²
        expected = torch.einsum("t,ti,tj->ij", size, a, a)
        assert (found.a_weighted - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.filterwarnings("ignore:.*negative eigenvalues")
@pytest.mark.parametrize("per", ["position", "sequence"])
def test_exact_labels_correct_a_basis_by_the_mean_of_all(per: str) -> None:
    model, x = mlp(3), torch.randn(5, 6)
    basis = run(model, [x], "*").eigh()
    corrections = curvfast.correct(model, basis, [x], labels="exact", per=per, progress=False)
    found = corrections.layers["2"]
    a = model[:2](x).detach() @ basis["2"].vectors_a
    u = basis["2"].vectors_g
    expected = sum(
        torch.outer((u.T @ fisher(SOFTMAX, f) @ u).diag(), row.square())
        for f, row in zip(model(x).detach(), a, strict=True)
    )
    assert found.count == 5
    assert (found.sum - expected).norm() < 1e-4 * expected.norm()


def test_too_many_classes_for_exact_labels_are_refused() -> None:
    with pytest.raises(InputError, match=r"65 outputs at each of 1 .*labels='sampled'"):
        run(mlp(65), [torch.randn(3, 6)], "*", labels="exact")
    with pytest.raises(InputError, match="61 outputs at each of 10"):
        run(llama(), token_batches("none", sizes=(11,)), labels="exact")


# ---- the model is asked -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "labels", "name"),
    [
        ({"num_labels": 1}, None, NORMAL),
        ({"num_labels": 3}, None, SOFTMAX),
        ({"num_labels": 3}, torch.zeros(2, 3), BERNOULLI),
        (
            {"num_labels": 3, "problem_type": _SINGLE},
            torch.eye(3)[:2],
            SOFTMAX,
        ),
        ({"num_labels": 3, "problem_type": _MULTI}, None, BERNOULLI),
        ({"num_labels": 3, "problem_type": "regression"}, None, NORMAL),
        ({"num_labels": 1, "problem_type": _MULTI}, None, BERNOULLI),
    ],
)
def test_the_likelihood_is_what_transformers_loss_is(facts: Any, labels: Any, name: str) -> None:
    for model in (bert("SequenceClassification", **facts), _vit(**facts)):
        shape = torch.Size([2, facts["num_labels"]])
        found = likelihood_of(model, shape, labels, [])
        assert (found.name, found.how) == (name, CONVENTION)


def _vit(**facts: Any) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        image_size=8, patch_size=8, num_channels=1, **facts,
    )  # fmt: skip
    return ViTForImageClassification(config)


def test_a_regression_has_the_fisher_of_a_normal() -> None:
    model, ids = bert("SequenceClassification", num_labels=1).eval(), tokens(3)
    name = "bert.encoder.layer.1.output.dense"
    found = run(model, [{"input_ids": ids}], [name], labels="exact")
    g = gradients_of(model, name, lambda: model(input_ids=ids).logits.sum())
    assert (found[name].g_sum - g.T @ g).norm() < 1e-5 * (g.T @ g).norm()
    assert found.provenance["likelihood"]["rule"] == "normal with variance 1"
    assert "num_labels=1" in found.provenance["likelihood"]["by"]


@pytest.mark.parametrize("labels", [torch.tensor([3, 1, 2]), torch.tensor([3.5, 1.0, 2.0])])
def test_ratings_of_a_regression_may_be_whole_numbers(labels: Tensor) -> None:
    model, ids = bert("SequenceClassification", num_labels=1).eval(), tokens(3)
    name = "bert.encoder.layer.1.output.dense"
    found = run(model, [{"input_ids": ids, "labels": labels}], [name], labels="gold")[name]
    g = gradients_of(
        model,
        name,
        lambda: 0.5 * (model(input_ids=ids).logits[:, 0] - labels).square().sum(),
    )
    assert (found.g_sum - g.T @ g).norm() < 1e-5 * (g.T @ g).norm()


@pytest.mark.parametrize(("outputs", "squeezed"), [(1, False), (1, True)])
def test_one_output_of_an_unknown_model_is_refused(outputs: int, squeezed: bool) -> None:
    model, x = mlp(outputs, squeezed), torch.randn(5, 6)
    with pytest.raises(InputError, match="'bernoulli' for independent labels, or 'normal'"):
        run(model, [x], "*")
    for name in (BERNOULLI, NORMAL):
        found = run(model, [x], "*", likelihood=name)
        assert found.provenance["tokens"] == 5
        assert found.provenance["likelihood"]["how"] == TOLD
        assert float(next(iter(found.values())).g_sum.trace()) > 0


def test_what_the_caller_says_overrides_the_model() -> None:
    model = bert("SequenceClassification", num_labels=3)
    told = run(model, [{"input_ids": tokens()}], likelihood=NORMAL)
    assert told.provenance["likelihood"]["by"] == "likelihood='normal'"
    with pytest.raises(InputError, match="pass 'softmax'"):
        run(model, [], likelihood="poisson")
    with pytest.raises(InputError, match="leave one of them out"):
        run(model, [], likelihood=NORMAL, class_axis=1)


def test_classes_are_as_many_as_the_model_says() -> None:
    model = bert("SequenceClassification", num_labels=3)
    model.classifier = nn.Linear(16, 4)
    with pytest.raises(InputError, match="num_labels is 3"):
        run(model, [{"input_ids": tokens()}])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 3]), "not among the 3 classes"),
        (torch.tensor([0, -1]), "not among the 3 classes"),
        (torch.tensor([0.0, 1.0]), "class indices, or probabilities"),
        (torch.tensor([[0.2, 0.2, 0.2]] * 2), "does not sum to 1"),
        (torch.tensor([[0], [1]]), "labels or their mask are"),
        (None, "holds no 'labels'"),
    ],
)
def test_labels_that_are_none_of_a_softmax_are_refused_by_name(labels: Any, message: str) -> None:
    batch = {"input": torch.randn(2, 6)} | ({} if labels is None else {"labels": labels})
    with pytest.raises(curvfast.CurvfastError, match=message):
        run(mlp(3), [batch], "*", labels="gold")


def test_labels_that_are_none_of_bernoullis_are_refused_by_name() -> None:
    batch = {"input": torch.randn(2, 6), "labels": torch.tensor([[0, 1, 2], [0, 0, 1]])}
    with pytest.raises(InputError, match="between 0 and 1"):
        run(mlp(3), [batch], "*", labels="gold", likelihood=BERNOULLI)
    with pytest.raises(ShapeError, match="one number for each"):
        run(mlp(3), [{**batch, "labels": torch.zeros(2)}], "*", labels="gold", likelihood=NORMAL)


# ---- where the classes are ----------------------------------------------------------------------


def _segformer(labels: int) -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        num_labels=labels, depths=[1, 1], hidden_sizes=[8, 16], num_encoder_blocks=2,
        sr_ratios=[2, 1], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2],
        mlp_ratios=[2, 2], decoder_hidden_size=16, drop_path_rate=0.0,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout_prob=0.0,
    )  # fmt: skip
    return SegformerForSemanticSegmentation(config)


@pytest.mark.parametrize("classes", [3, 8])
def test_classes_of_a_segmentation_are_on_the_second_axis(classes: int) -> None:
    model, x = _segformer(classes).eval(), torch.randn(2, 3, 32, 32)
    y = torch.randint(classes, (2, 8, 8))
    y[0, :3] = 255  # what its config ignores
    name = "segformer.stages.1.blocks.0.mlp.fc2"
    found = run(model, [{"pixel_values": x, "labels": y}], [name], labels="gold")
    g = gradients_of(
        model,
        name,
        lambda: F.cross_entropy(model(pixel_values=x).logits, y, reduction="sum", ignore_index=255),
    )
    assert (found[name].g_sum - g.T @ g).norm() < 1e-4 * (g.T @ g).norm()
    assert found.provenance["tokens"] == 104
    drawn = run(model, [{"pixel_values": x}], [name])
    assert drawn.provenance["tokens"] == 128
    with pytest.raises(ShapeError, match="leave them out of the batch"):
        run(model, [{"pixel_values": x, "labels": torch.zeros(2, 32, 32).long()}], [name])


class _Channels(nn.Module):
    """Outputs [N, C, L] of features [N, L, d]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(6, 8), nn.Linear(8, classes)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return self.out(self.up(x).tanh()).mT


@pytest.mark.parametrize("labels", ["sampled", "gold"])
def test_the_shape_of_labels_or_inputs_tells_where_the_classes_are(labels: str) -> None:
    model, x = _Channels(3), torch.randn(2, 5, 6)
    batch = {"x": x, "labels": torch.randint(3, (2, 5))}
    found = run(model, [batch], "*", labels=labels)
    assert found.provenance["likelihood"]["rule"] == "softmax over axis 1"
    assert found.provenance["tokens"] == 10
    assert run(model, [x], "*").provenance["tokens"] == 10
    if labels == "gold":
        loss = lambda: F.cross_entropy(model(x), batch["labels"], reduction="sum")  # noqa: E731
        g = gradients_of(model, "up", loss)
        assert (found["up"].g_sum - g.T @ g).norm() < 1e-5 * (g.T @ g).norm()


@pytest.mark.parametrize("layers", ["1", "*"])
def test_the_layer_that_made_the_outputs_tells_where_the_classes_are(layers: str) -> None:
    head, x = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5)), torch.randn(2, 5, 6)
    y = torch.randint(5, (2, 5))
    found = run(head, [{"input": x, "labels": y}], layers, labels="gold")
    loss = lambda: F.cross_entropy(head(x).mT, y, reduction="sum")  # noqa: E731
    g = gradients_of(head, "1", loss)
    assert (found["1"].g_sum - g.T @ g).norm() < 1e-5 * (g.T @ g).norm()
    convolved, x = nn.Sequential(nn.Linear(5, 5), nn.Conv1d(6, 5, 1)), torch.randn(2, 6, 5)
    found = run(convolved, [{"input": x, "labels": y}], "0", labels="gold")
    loss = lambda: F.cross_entropy(convolved(x), y, reduction="sum")  # noqa: E731
    g = gradients_of(convolved, "0", loss)
    assert (found["0"].g_sum - g.T @ g).norm() < 1e-5 * (g.T @ g).norm()


def test_classes_that_fit_two_axes_are_refused_until_told() -> None:
    model, x = _Channels(5), torch.randn(2, 5, 6)
    with pytest.raises(ShapeError, match="class_axis=1 or"):
        run(model, [{"x": x, "labels": torch.randint(5, (2, 5))}], "*", labels="gold")
    with pytest.raises(ShapeError, match="class_axis=1 or"):
        likelihood_of(nn.Linear(1, 1), torch.Size([2, 5, 8, 8]), None, [])
    told = likelihood_of(nn.Linear(1, 1), torch.Size([2, 5, 8, 8]), None, [], Said(class_axis=1))
    assert (told.axis, told.how) == (1, TOLD)


# ---- encoder-decoders ---------------------------------------------------------------------------


def _decoders() -> Iterator[Any]:
    small = {"vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    widths = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "dropout": 0.0, "pad_token_id": 1}
    own = {**small, **heads, **widths, "eos_token_id": 2, "init_std": 0.3}
    t5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    start = {"decoder_start_token_id": 2}
    sound = {"max_source_positions": 8, "max_target_positions": 16, "num_mel_bins": 4}
    wi, fc = "decoder.block.0.layer.2.DenseReluDense.wi", "model.decoder.layers.0.fc1"
    t5 |= {"dropout_rate": 0.0, "decoder_start_token_id": 0}
    yield "T5", "ForConditionalGeneration", t5, wi
    yield "Bart", "ForConditionalGeneration", {**own, **start, "bos_token_id": 0}, fc
    yield "Marian", "MTModel", {**own, "decoder_start_token_id": 1}, fc
    yield "Pegasus", "ForConditionalGeneration", {**own, "decoder_start_token_id": 1}, fc
    yield "Whisper", "ForConditionalGeneration", {**own, **sound, **start, "bos_token_id": 0}, fc


@pytest.mark.parametrize("labels", ["gold", "sampled"])
@pytest.mark.parametrize("case", list(_decoders()), ids=lambda case: case[0])
def test_labels_alone_make_a_decoders_input_as_the_model_does(case: Any, labels: str) -> None:
    import transformers

    family, head, config, name = case
    made = getattr(transformers, f"{family}Config")(**config)
    model = getattr(transformers, family + head)(made).eval()
    y = tokens(2, 7)
    y[0, 3] = y[1, 0] = -100
    source = {"input_features": torch.randn(2, 4, 16)} if family == "Whisper" else {
        "input_ids": tokens()
    }  # fmt: skip
    found = run(model, [{**source, "labels": y}], [name], labels=labels)
    assert found.provenance["tokens"] == 12
    assert "is_encoder_decoder" in found.provenance["causal"]["by"]
    if labels == "gold":
        g = gradients_of(model, name, lambda: 12 * model(**source, labels=y).loss)
        assert (found[name].g_sum - g.T @ g).norm() < 1e-5 * (g.T @ g).norm()


def test_a_decoder_without_input_or_labels_is_refused_by_name() -> None:
    import transformers

    _, _, config, name = next(_decoders())
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**config))
    with pytest.raises(InputError, match="put 'labels' into every batch"):
        run(model, [{"input_ids": tokens()}], [name])


# ---- which predictions get a label --------------------------------------------------------------


def sft() -> dict[str, Tensor]:
    ids = torch.randint(1, 61, (2, 8))
    labels = ids.clone()
    labels[0, :5], labels[1, :2] = -100, -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("labels", ["sampled", "gold"])
def test_labels_are_where_those_of_the_batch_are(labels: str) -> None:
    model, batch = llama(), sft()
    assert run(model, [batch], labels=labels).provenance["tokens"] == 9
    shifted = torch.full_like(batch["labels"], -100)
    shifted[:, :-1] = batch["labels"][:, 1:]
    again = {"input_ids": batch["input_ids"], "shift_labels": shifted}
    assert run(model, [again], labels=labels).provenance["tokens"] == 9


@pytest.mark.parametrize("labels", ["sampled", "gold"])
def test_a_label_mask_restricts_them(labels: str) -> None:
    model, batch = llama(), sft()
    answer = batch["labels"] != -100
    expected = run(model, [batch], labels=labels)
    bare = {"input_ids": batch["input_ids"]}
    named = run(model, [{**bare, "answer": answer}], labels=labels, label_mask="answer")
    made = run(model, [bare], labels=labels, label_mask=lambda batch: answer)
    for found in (named, made):
        assert found.provenance["tokens"] == 9
        for name, layer in expected.items():
            assert torch.equal(found[name].g_sum, layer.g_sum)
    with pytest.raises(InputError, match="label_mask='answer' gave NoneType"):
        run(model, [bare], labels=labels, label_mask="answer")
    with pytest.raises(ShapeError, match=r"label_mask= is \[2, 7\]"):
        run(model, [batch], labels=labels, label_mask=lambda batch: answer[:, 1:])


@pytest.mark.parametrize("labels", ["sampled", "gold"])
@pytest.mark.parametrize("how", ["position_ids", "attention_mask", "cu_seq_lens_q"])
def test_the_last_token_of_a_packed_document_predicts_nothing(labels: str, how: str) -> None:
    from curvfast.collection.targets import Targets, scored_rows

    facts = {
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 2]]),
        "cu_seq_lens_q": torch.tensor([0, 4, 9], dtype=torch.int32),
    }
    rows = scored_rows(
        {how: facts[how]}, Targets(None, None), torch.Size([1, 9]), torch.device("cpu"),
        causal=True, decoder=False, classes=True,
    )  # fmt: skip
    assert rows.indices(torch.device("cpu")).tolist() == [0, 1, 2, 4, 5, 6, 7]
    if how == "position_ids":
        batch = {"input_ids": torch.randint(1, 61, (1, 9)), how: facts[how]}
        assert run(llama(), [batch], labels=labels).provenance["tokens"] == 7


# ---- causal or not ------------------------------------------------------------------------------


class _Gpt(nn.Module):
    """A hand-written language model; ``window`` lets every position see so many later ones."""

    def __init__(self, later: bool = False, width: int = 50) -> None:
        super().__init__()
        self.emb, self.up, self.down = nn.Embedding(50, 16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.head, self.later = nn.Linear(16, width), later

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.emb(input_ids)
        x += 1  # in place, as positions may be added
        seen = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        x = x.mean(1, keepdim=True) + x if self.later else seen
        return self.head(x + self.down(self.up(x).relu()))


@pytest.mark.parametrize(
    ("model", "causal", "how"),
    [
        (lambda: _Gpt(), True, PROVEN),
        (lambda: nn.ModuleDict({"lm": _Gpt()})["lm"], True, PROVEN),
        (lambda: _Gpt(later=True), False, PROVEN),
        (lambda: _Gpt(width=9), False, CONVENTION),
        (lambda: bert("MaskedLM"), False, PROVEN),
        (lambda: bert("TokenClassification"), False, PROVEN),
        (llama, True, PROVEN),
    ],
)
@pytest.mark.parametrize("given", ["input_ids", "padded", "left"])
def test_the_model_is_asked_whether_it_predicts_the_next_token(
    model: Any, causal: bool, how: str, given: str
) -> None:
    ids = tokens(3, 6)
    mask = torch.ones_like(ids)
    if given != "input_ids":
        mask[:, 5:] = mask[1, 3:] = 0
        mask = mask.flip(1) if given == "left" else mask
    batch = {"input_ids": ids} | ({"attention_mask": mask} if given != "input_ids" else {})
    found = run(model(), [batch], "*[ui][pn]*")
    assert found.provenance["causal"]["how"] == how
    assert found.provenance["collect"]["skip_last"] is causal
    assert found.provenance["tokens"] == int(mask.sum()) - 3 * causal


def test_a_row_too_short_to_ask_leaves_it_to_the_class() -> None:
    for model, causal in ((llama(), True), (_Gpt(), False)):
        found = run(model, [{"input_ids": tokens(2, 2)}], "*up*")
        assert found.provenance["causal"]["how"] == CONVENTION
        assert found.provenance["collect"]["skip_last"] is causal


def test_asking_changes_nothing() -> None:
    model, batches = _Gpt(), [{"input_ids": tokens(3, 6)}]
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    asked = run(model, batches, ["up"])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    told = run(model, batches, ["up"], skip_last=True)
    assert torch.equal(asked["up"].g_sum, told["up"].g_sum)
    assert torch.equal(asked["up"].a_sum, told["up"].a_sum)
    assert told.provenance["causal"]["how"] == TOLD


def test_what_the_first_batch_showed_holds_after_a_restart(tmp_path: Any) -> None:
    model = _Gpt()
    batches = [{"input_ids": tokens(3, n)} for n in (6, 2, 2)]

    def cut() -> Iterator[Any]:
        yield batches[0]
        raise KeyError

    expected = run(model, batches, ["up"])
    with pytest.raises(KeyError):
        run(model, cut(), ["up"], checkpoint=tmp_path, every=1)
    for _ in range(2):
        found = run(model, batches, ["up"], checkpoint=tmp_path, every=1)
        assert torch.equal(found["up"].g_sum, expected["up"].g_sum)
        assert found.provenance["causal"] == expected.provenance["causal"]
        assert found.provenance["likelihood"] == expected.provenance["likelihood"]
        assert found.provenance["collect"]["skip_last"] is True


def _vlm(family: str) -> nn.Module:
    import transformers

    text = {
        "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 20,
        "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    config = transformers.LlavaConfig(
        text_config={**text, "model_type": family}, vision_config=vision, image_token_id=49
    )
    return transformers.LlavaForConditionalGeneration(config)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_language_model_that_reads_images_is_causal(family: str) -> None:
    model = _vlm(family)
    assert causal_convention(model) == (True, "class LlavaForConditionalGeneration")
    found = run(model, [{"input_ids": tokens(2, 6)}], "*language_model*up_proj")
    assert found.provenance["tokens"] == 10
    assert next(iter(found.values())).rows_g == 10


def test_who_says_that_a_model_is_causal() -> None:
    import transformers

    wrapped = nn.Module()
    wrapped.lm = llama()
    _, _, config, _ = next(_decoders())
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**config))
    around = nn.Module()
    around.seq2seq = t5
    assert causal_convention(wrapped) == (True, "class LlamaForCausalLM")
    assert causal_convention(llama()) == (True, "class LlamaForCausalLM")
    assert not causal_convention(t5)[0]
    assert not causal_convention(around)[0]
    assert not causal_convention(bert("MaskedLM"))[0]
    assert "does not say" in causal_convention(_Gpt())[1]


# ---- told early ---------------------------------------------------------------------------------


class _Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.spare = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(6, 6)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.spare(x) if self.calls > 3 else x
        return self.fc2(self.fc1(x).tanh())


@pytest.mark.parametrize("layers", ["*", ["fc1", "spare"], "spare", lambda name, module: True])
def test_a_named_layer_that_is_not_called_is_told_after_the_first_batch(layers: Any) -> None:
    read = []
    with pytest.raises(CoverageError, match=r"never called 1 chosen layer\(s\): 'spare'"):
        run(_Idle(), (read.append(1) or torch.randn(4, 6) for _ in range(9)), layers)
    assert len(read) == 1


@pytest.mark.parametrize("layers", ["all", ["all", "attention"]])
def test_one_chosen_by_kind_is_left_out_from_then_on(layers: Any) -> None:
    model, read = _Idle(), []

    def batches() -> Iterator[Tensor]:
        for _ in range(9):
            read.append([str(each.message) for each in caught])
            yield torch.randn(4, 6)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run(model, batches(), layers)
    assert not read[0]
    assert "'spare'" in read[1][0]
    assert set(found) == {"fc1", "fc2"}
    assert {layer.rows_g for layer in found.values()} == {36}
    assert found.provenance["never_called"] == ["spare"]
    uncovered = found.provenance["coverage"]["uncovered"]
    assert uncovered["spare.weight"] == "the model never called it"


def test_a_model_that_calls_none_is_told_after_the_first_batch() -> None:
    model, read = nn.ModuleDict({"fc1": nn.Linear(6, 3)}), []
    outer = _Functional(model)
    with pytest.raises(CoverageError, match="read by other code"):
        run(outer, (read.append(1) or torch.randn(4, 6) for _ in range(9)), "all")
    assert len(read) == 1


class _Functional(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner["fc1"].weight)


def test_experts_that_get_no_token_are_not_told() -> None:
    from families import mixture

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)
        found = run(mixture("Mixtral"), [{"input_ids": torch.tensor([[3, 4, 5]])}], "*experts*")
    assert found


# ---- offloaded ----------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload"])
def test_an_offloaded_model_is_measured_where_it_runs(offload: str, tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, batches = llama(), token_batches("none", sizes=(9, 8))
    expected = run(model, batches)
    options = {"offload_dir": str(tmp_path)} if offload == "disk_offload" else {}
    getattr(accelerate, offload)(model, execution_device=torch.device("cpu"), **options)
    assert next(model.parameters()).device.type == "meta"
    found = run(model, batches)
    for name, layer in expected.items():
        assert torch.equal(found[name].a_sum, layer.a_sum)
        assert torch.equal(found[name].g_sum, layer.g_sum)
