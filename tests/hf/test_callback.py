"""CurvatureCallback: training is untouched, G is of the summed loss, and the log survives."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import keep_tokens, token_loss
from cases import llama as larger_llama
from oracle import brute_force
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import curvfast
from curvfast.collection.config import CollectConfig
from curvfast.errors import CurvfastError, EvidenceError, InputError, LayerNotFound
from curvfast.kfac.spectrum_log import FILE, SpectrumRecord, read_log

pytest.importorskip("accelerate")
from transformers import Trainer, TrainerCallback, TrainingArguments

# What transformers calls it, from one of its versions on.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)

VOCABULARY = 13

pytestmark = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """TrainingArguments write into the environment; what they write goes with the test."""
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"):
        monkeypatch.setenv(name, "no")
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def llama(**changes: Any) -> nn.Module:
    """Return a model so narrow that no product is split over threads, which await each other."""
    small = {
        "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 12,
        "vocab_size": VOCABULARY, "attn_implementation": "eager",
    }  # fmt: skip
    return larger_llama(**small, **changes)


def texts(number: int = 8, length: int = 8) -> list[dict[str, Tensor]]:
    """Return padded sequences of unequal lengths, some of whose labels are masked."""
    tokens = torch.randint(1, VOCABULARY, (number, length))
    examples = []
    for i, row in enumerate(tokens):
        mask = torch.ones_like(row)
        mask[length - i % 5 :] = 0
        examples.append(
            {"input_ids": row, "attention_mask": mask, "labels": row.masked_fill(mask == 0, -100)}
        )
    return examples


def whole(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


def arguments(tmp_path: Path, **changes: Any) -> TrainingArguments:
    usual: dict[str, Any] = {
        "output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": [],
        "disable_tqdm": True, "save_strategy": "no", "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4, "max_steps": 1, "logging_steps": 1,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "optim": "adamw_torch",
    }  # fmt: skip
    return TrainingArguments(**{**usual, **changes})


def train(
    model: nn.Module,
    examples: list[dict[str, Tensor]],
    callbacks: list[TrainerCallback],
    tmp_path: Path,
    kind: type[Trainer] = Trainer,
    given: dict[str, Any] | None = None,
    resume: str | None = None,
    **changes: Any,
) -> Trainer:
    trainer = kind(
        model, arguments(tmp_path, **changes), train_dataset=examples,
        eval_dataset=examples[:4], callbacks=callbacks, **(given or {}),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def hooks(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in model.modules()
    )


def measured(
    model: nn.Module,
    examples: list[dict[str, Tensor]],
    tmp_path: Path,
    layers: Any = "mlp",
    loss_scale: float | None = None,
    **rest: Any,
) -> tuple[curvfast.Factors, SpectrumRecord]:
    """Return what a callback measures in the first step of a training."""
    callback = curvfast.CurvatureCallback(
        tmp_path / "log", layers, save_factors=True, loss_scale=loss_scale
    )
    train(model, examples, [callback], tmp_path, **rest)
    return curvfast.Factors.from_pretrained(tmp_path / "log" / "factors-0"), read_log(
        tmp_path / "log"
    )[-1]


def assert_are(factors: curvfast.Factors, records: dict[str, Any], tolerance: float = 2e-6) -> None:
    for name, record in records.items():
        a, g, rows = record.moments()
        assert factors[name].rows_a == factors[name].rows_g == rows
        for found, expected in ((factors[name].a_sum, a), (factors[name].g_sum, g)):
            assert (found.double() - expected).norm() <= tolerance * expected.norm()


def of_tokens(model: nn.Module, layers: list[str], examples: list[dict[str, Tensor]]) -> Any:
    return brute_force(model.double(), layers, [whole(examples)], keep_tokens, token_loss)


LAYERS = ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"]


# --- training is untouched ------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_training_with_and_without_it_is_bit_identical(
    reentrant: bool | None, tmp_path: Path
) -> None:
    model = llama(attention_dropout=0.2).train()
    changes: dict[str, Any] = {}
    if reentrant is not None:
        model.enable_input_require_grads()
        changes = {
            CHECKPOINTING: True,
            f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant},
        }
    twin, examples, found = copy.deepcopy(model), texts(), []
    callback = curvfast.CurvatureCallback(
        tmp_path / "log", "all", every=3, steps=2, rows_per_step=0.5
    )
    for each, callbacks in ((model, [callback]), (twin, [])):
        trainer = train(
            each, examples, callbacks, tmp_path, max_steps=4, gradient_accumulation_steps=2,
            eval_strategy="steps", eval_steps=2, **changes,
        )  # fmt: skip
        losses = [entry.get("loss", entry.get("eval_loss")) for entry in trainer.state.log_history]
        adam = trainer.optimizer.state_dict()["state"]
        found.append((each.state_dict(), torch.get_rng_state(), losses, adam))
    (weights, rng, losses, adam), (weights_0, rng_0, losses_0, adam_0) = found
    assert all(torch.equal(weights[name], weights_0[name]) for name in weights_0)
    assert torch.equal(rng, rng_0)
    assert losses == losses_0
    assert all(torch.equal(adam[i]["exp_avg"], adam_0[i]["exp_avg"]) for i in adam_0)
    assert [record.step for record in read_log(tmp_path / "log")] == [0, 3]


class Watch(TrainerCallback):
    """Counts the hooks that each forward of a training runs under."""

    def __init__(self) -> None:
        self.step, self.seen = 0, {}

    def on_step_begin(self, args, state, control, model, **kwargs) -> None:
        self.seen[state.global_step] = hooks(model)


def test_hooks_are_on_the_model_in_the_chosen_steps_only(tmp_path: Path) -> None:
    model, watch = llama(), Watch()
    callback = curvfast.CurvatureCallback(tmp_path / "log", every=3, steps=2)
    train(model, texts(), [callback, watch], tmp_path, max_steps=8, gradient_accumulation_steps=1)
    assert {step for step, count in watch.seen.items() if count} == {0, 1, 3, 4, 6, 7}
    assert hooks(model) == 0


class Probe(TrainerCallback):
    """Trains on the side between steps, as a probe of generalisation might."""

    def on_step_end(self, args, state, control, model, **kwargs) -> None:
        with torch.enable_grad():
            model(**whole(texts(2))).loss.backward()
        model.zero_grad()


def test_evaluation_and_other_calls_between_steps_do_not_count(tmp_path: Path) -> None:
    examples, found = texts(), []
    model = llama()
    for name, callbacks, strategy in (("one", [], "no"), ("two", [Probe()], "steps")):
        callback = curvfast.CurvatureCallback(tmp_path / name, steps=2, save_factors=True)
        train(
            copy.deepcopy(model), examples, [callback, *callbacks], tmp_path, max_steps=2,
            eval_strategy=strategy, eval_steps=1, learning_rate=0.0,
        )  # fmt: skip
        found.append(curvfast.Factors.from_pretrained(tmp_path / name / "factors-0"))
    for name in found[0]:
        assert found[0][name].rows_g == found[1][name].rows_g
        assert torch.equal(found[0][name].g_sum, found[1][name].g_sum)


class Stop(TrainerCallback):
    """Fails in the middle of a step."""

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        raise ZeroDivisionError


@pytest.mark.parametrize("then", ["forward", "close", "train"])
def test_after_an_exception_the_hooks_are_gone_at_the_next_call(then: str, tmp_path: Path) -> None:
    model, examples = llama(), texts()
    callback = curvfast.CurvatureCallback(tmp_path / "log")
    with pytest.raises(ZeroDivisionError):
        train(model, examples, [callback, Stop()], tmp_path)
    assert hooks(model)
    if then == "forward":
        model(**whole(examples)).loss.backward()
    elif then == "close":
        callback.close()
    else:
        train(model, examples, [callback], tmp_path)
        (record,) = read_log(tmp_path / "log")
        # Nothing of the step that was left counts.
        kept = int(keep_tokens(whole(examples)).sum())
        assert {layer.rows for layer in record.layers.values()} == {kept}
    assert hooks(model) == 0


# --- G is of the summed loss ----------------------------------------------------------------------


class Doubled(Trainer):
    """Scales the loss in place, as the Trainer does where it averages over two processes."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        loss *= 2
        return loss


@pytest.mark.parametrize("kind", [Trainer, Doubled])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_its_factors_are_those_of_brute_force(
    kind: type[Trainer], accumulation: int, tmp_path: Path
) -> None:
    model, examples = llama().double(), texts()
    twin = copy.deepcopy(model)
    factors, record = measured(
        model, examples, tmp_path, kind=kind, gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=8 // accumulation,
    )  # fmt: skip
    assert_are(factors, of_tokens(twin, LAYERS, examples))
    batch = whole(examples)
    labels = (batch["labels"][:, 1:] != -100).sum()
    expected = token_loss(twin(**batch), batch).detach() / labels
    assert record.loss == pytest.approx(float(expected), rel=1e-5)


def test_several_processes_are_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As three ranks would see it: labels of all are counted, and the loss is times three."""
    from accelerate.state import PartialState

    class Third(Trainer):
        def _get_num_items_in_batch(self, *args, **kwargs):
            return 3 * super()._get_num_items_in_batch(*args, **kwargs)

        def compute_loss(self, *args, **kwargs):
            with monkeypatch.context() as patch:
                patch.setattr(type(self.accelerator), "num_processes", 3)
                return super().compute_loss(*args, **kwargs)

    assert PartialState().num_processes == 1
    model, examples = llama().double(), texts()
    twin = copy.deepcopy(model)
    factors, _ = measured(model, examples, tmp_path, kind=Third)
    assert_are(factors, of_tokens(twin, LAYERS, examples))


def test_bfloat16_autocast_is_within_its_rounding(tmp_path: Path) -> None:
    model, examples = llama(), texts()
    twin = copy.deepcopy(model)
    factors, _ = measured(model, examples, tmp_path, bf16=True)
    assert_are(factors, of_tokens(twin, LAYERS, examples), tolerance=3e-2)


class Tokens(nn.Module):
    """A classifier of tokens that takes any keyword, as many of transformers' models do."""

    def __init__(self, reads: bool, loss: Callable[..., Tensor], extra: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 10)
        self.mlp, self.head = nn.Linear(10, 7), nn.Linear(7, 5)
        self.reads, self.loss, self.extra = reads, loss, extra

    def forward(self, input_ids, labels=None, **kwargs):
        logits = self.head(self.mlp(self.embedding(input_ids)).relu())
        n = kwargs.get("num_items_in_batch") if self.reads else None
        loss = self.loss(logits, labels) / ((labels != -100).sum() if n is None else n)
        return {"loss": loss + self.extra * logits.square().mean(), "logits": logits}


def classes(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def squares(logits: Tensor, labels: Tensor) -> Tensor:
    return mse_loss(logits, labels[..., None].expand_as(logits).double(), reduction="sum")


def tagged(number: int = 8) -> list[dict[str, Tensor]]:
    tokens = torch.randint(VOCABULARY, (number, 6))
    labels = torch.randint(5, (number, 6)).masked_fill(torch.rand(number, 6) < 0.3, -100)
    return [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("kind", ["exact", "bfloat16"])
def test_a_model_that_passes_over_the_number_of_items_is_found_out(
    reads: bool, kind: str, tmp_path: Path
) -> None:
    half = kind == "bfloat16"
    model, examples = Tokens(reads, classes), tagged()
    model = model if half else model.double()
    twin = copy.deepcopy(model).double()
    factors, _ = measured(model, examples, tmp_path, bf16=half)
    expected = brute_force(
        twin, ["mlp"], [whole(examples)],
        lambda batch: torch.ones_like(batch["input_ids"], dtype=torch.bool),
        lambda output, batch: classes(output["logits"], batch["labels"]),
    )  # fmt: skip
    assert_are(factors, expected, tolerance=2e-6 if kind == "exact" else 3e-2)


def test_a_loss_with_a_term_beside_the_cross_entropy_is_not_taken_for_one(tmp_path: Path) -> None:
    callback = curvfast.CurvatureCallback(tmp_path / "refused", save_factors=True)
    train(Tokens(True, classes, 1e-4).double(), tagged(), [callback], tmp_path)
    assert isinstance(callback.refusal, EvidenceError)


def test_a_loss_whose_labels_cannot_be_told_is_refused(tmp_path: Path) -> None:
    examples = tagged()
    for example in examples:
        example["labels"] = example["labels"].clamp_min(0)
    model = Tokens(True, squares).double()
    callback = curvfast.CurvatureCallback(tmp_path / "refused", save_factors=True)
    trainer = train(model, examples, [callback], tmp_path)
    assert trainer.state.global_step == 1
    assert isinstance(callback.refusal, EvidenceError)
    factors, _ = measured(
        model, examples, tmp_path, loss_scale=1.0, gradient_accumulation_steps=1,
        per_device_train_batch_size=8,
    )  # fmt: skip
    assert factors["mlp"].rows_g == 48


class Plain(Tokens):
    """A model that takes no keywords: the Trainer divides by accumulation steps itself."""

    def forward(self, input_ids, labels=None):
        return super().forward(input_ids, labels)


def test_the_last_accumulation_of_an_epoch_may_be_shorter(tmp_path: Path) -> None:
    model, examples = Plain(False, classes).double(), tagged(6)
    expected = brute_force(
        copy.deepcopy(model), ["mlp"], [whole(examples)],
        lambda batch: torch.ones_like(batch["input_ids"], dtype=torch.bool),
        lambda output, batch: classes(output["logits"], batch["labels"]),
    )  # fmt: skip
    # Three batches: one optimizer step of two, and one of one.
    callback = curvfast.CurvatureCallback(tmp_path / "log", steps=2, save_factors=True)
    train(
        model, examples, [callback], tmp_path, max_steps=2, gradient_accumulation_steps=2,
        learning_rate=0.0,
    )  # fmt: skip
    assert_are(curvfast.Factors.from_pretrained(tmp_path / "log" / "factors-0"), expected)


def mean_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    return token_loss(outputs, {"labels": labels}) / num_items_in_batch


@pytest.mark.parametrize("loss_scale", [None, 1.0])
def test_a_loss_made_outside_the_model_is_read_off_its_logits(
    loss_scale: float | None, tmp_path: Path
) -> None:
    model, examples = llama().double(), texts()
    twin = copy.deepcopy(model)
    given = {"compute_loss_func": mean_loss}
    factors, record = measured(model, examples, tmp_path, given=given, loss_scale=loss_scale)
    assert_are(factors, of_tokens(twin, LAYERS, examples))
    assert record.loss is None


@pytest.mark.parametrize("loss_scale", [None, 1.0])
def test_a_smoothed_loss_is_read_off_its_logits(loss_scale: float | None, tmp_path: Path) -> None:
    model, examples = llama().double(), texts()
    twin = copy.deepcopy(model)
    factors, _ = measured(
        model, examples, tmp_path, label_smoothing_factor=0.1, loss_scale=loss_scale
    )

    def smoothed(output: Any, batch: dict[str, Tensor]) -> Tensor:
        logits = output.logits[:, :-1].flatten(0, 1)
        labels = batch["labels"][:, 1:].flatten()
        return cross_entropy(logits, labels, reduction="sum", label_smoothing=0.1)

    assert_are(factors, brute_force(twin, LAYERS, [whole(examples)], keep_tokens, smoothed))


class Scaled:
    """An optimizer as accelerate wraps it where there is a GradScaler."""

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self.scaler, self.step_was_skipped = scaler, False


def by_hand(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    callback: TrainerCallback,
    optimizer: Any = None,
    overflow: int = -1,
    first: bool = True,
) -> None:
    """Run a loop that talks to its callback as the Trainer does."""
    args = SimpleNamespace(
        torch_compile=False, n_gpu=1, label_smoothing_factor=0.0, world_size=1 if first else 2
    )
    state = SimpleNamespace(global_step=0, is_world_process_zero=first)
    parts = {"model": model, "optimizer": optimizer}
    callback.on_train_begin(args, state, None, **parts)
    for number, batch in enumerate(batches):
        callback.on_step_begin(args, state, None, **parts)
        loss = model(**batch).loss / 3
        if optimizer is not None:
            loss = optimizer.scaler.scale(loss)
            optimizer.step_was_skipped = number == overflow
        (loss * (math.inf if number == overflow else 1)).backward()
        state.global_step += 1
        callback.on_step_end(args, state, None, **parts)
    callback.on_train_end(args, state, None, **parts)


def test_the_scale_of_mixed_precision_is_undone_and_skipped_steps_are_left_out(
    tmp_path: Path,
) -> None:
    model, examples = llama(), texts()
    callback = curvfast.CurvatureCallback(tmp_path, save_factors=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    batches = [whole(texts()), whole(examples)]
    by_hand(model, batches, callback, Scaled(scaler), overflow=0)
    factors = curvfast.Factors.from_pretrained(tmp_path / "factors-0")
    assert_are(factors, of_tokens(model, LAYERS, examples))


def test_collect_reads_the_scale_of_a_loop_too() -> None:
    model, examples = llama().double(), texts()
    with curvfast.collect(model, loss_scale=None) as curvature:
        loss = model(**whole(examples)).loss
        (loss / 7 * 3).backward()
    assert_are(curvature.factors(), of_tokens(model, LAYERS, examples))
    assert curvature.mean_loss() == pytest.approx(float(loss.detach()))


def test_a_batch_whose_loss_is_multiplied_by_zero_counts_nothing() -> None:
    model, examples = llama().double(), texts()
    with curvfast.collect(model) as curvature:
        model(**whole(examples), num_items_in_batch=1000).loss.backward()
        (0 * model(**whole(texts())).loss).backward()
    assert_are(curvature.factors(), of_tokens(model, LAYERS, examples))


def test_a_loss_that_is_negated_is_taken_for_no_cross_entropy() -> None:
    """A loop that unlearns goes up the loss: whose curvature is meant, it has to say."""
    model, examples = llama().double(), texts()
    with curvfast.collect(model) as curvature:
        (-model(**whole(examples)).loss).backward()
    with pytest.raises(EvidenceError, match="no cross-entropy"):
        curvature.factors()
    with curvfast.collect(model, loss_reduction="mean") as curvature:
        (-model(**whole(examples)).loss).backward()
    assert_are(curvature.factors(), of_tokens(model, LAYERS, examples))


# --- what cannot be measured is refused -----------------------------------------------------------


def test_compiled_and_replicated_models_are_refused_before_training(tmp_path: Path) -> None:
    model = llama()
    callback = curvfast.CurvatureCallback(tmp_path)
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)

    def begin(model: nn.Module, **changes: Any) -> None:
        args = {"torch_compile": False, "n_gpu": 1, "label_smoothing_factor": 0.0, **changes}
        callback.on_train_begin(SimpleNamespace(**args), state, None, model=model)

    def refused(model: nn.Module, match: str, **changes: Any) -> None:
        begin(model, **changes)
        assert isinstance(callback.refusal, InputError)
        assert match in str(callback.refusal)

    begin(model)
    assert callback.refusal is None
    refused(model, "DataParallel", n_gpu=2)
    refused(model, "ignores hooks", torch_compile=True)
    refused(torch.compile(model), "ignores hooks")
    model.model.layers[0].compile()
    refused(model, "ignores hooks")


def test_a_launcher_that_compiles_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    callback = curvfast.CurvatureCallback(tmp_path)
    by_hand(llama(), [whole(texts())], callback)
    assert "ignores hooks" in str(callback.refusal)
    assert list(tmp_path.iterdir()) == []


def test_layers_that_are_not_there_are_refused_before_training(tmp_path: Path) -> None:
    callback = curvfast.CurvatureCallback(tmp_path, "*.experts.*")
    by_hand(llama(), [whole(texts())], callback)
    assert isinstance(callback.refusal, LayerNotFound)


class Broken(nn.Module):
    """A head whose loss goes backward twice, as a gradient penalty's does."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.head = nn.Linear(6, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.mlp(x).relu())
        loss = cross_entropy(logits, labels)
        if torch.is_grad_enabled():
            torch.autograd.grad(loss, logits, retain_graph=True)
            torch.autograd.grad(loss, self.mlp.weight, retain_graph=True)
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_refusal_inside_a_step_ends_the_measurement_and_never_the_training(
    accumulation: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    examples = [{"x": torch.randn(6), "labels": torch.tensor(i % 5)} for i in range(8)]
    model, twin = (Broken() for _ in range(2))
    twin.load_state_dict(model.state_dict())
    callback = curvfast.CurvatureCallback(tmp_path / "log", "all", save_factors=True, every=2)
    usual: dict[str, Any] = {
        "max_steps": 4, "gradient_accumulation_steps": accumulation, "remove_unused_columns": False
    }  # fmt: skip
    trainer = train(model, examples, [callback], tmp_path, **usual)
    train(twin, examples, [], tmp_path, **usual)
    assert trainer.state.global_step == 4
    for name, weight in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)
    assert hooks(model) == 0
    assert not (tmp_path / "log").exists()
    # Two measurements were refused for one reason.
    (record,) = [entry for entry in caplog.records if entry.name == "curvfast.hf.callback"]
    assert "the training goes on" in record.getMessage()
    assert str(callback.refusal) in record.getMessage()
    assert callback.refusal is not None
    assert callback.refusal.__traceback__ is None
    with pytest.raises(type(callback.refusal)) as caught:
        _ = callback.factors
    assert caught.value is callback.refusal


def test_a_layer_that_cannot_be_measured_does_not_end_a_training(tmp_path: Path) -> None:
    model = llama()
    callback = curvfast.CurvatureCallback(tmp_path / "log", ["lm_head"])
    model.lm_head.weight = model.model.embed_tokens.weight
    by_hand(model, [whole(texts())] * 2, callback)
    assert isinstance(callback.refusal, CurvfastError)
    assert hooks(model) == 0


def test_factors_of_the_last_measurement_are_read_back(tmp_path: Path) -> None:
    batches = [whole(texts())] * 2
    callback = curvfast.CurvatureCallback(tmp_path / "one", save_factors=True, every=1)
    with pytest.raises(InputError, match="save_factors=True"):
        _ = callback.factors
    model = llama()
    by_hand(model, batches, callback)
    saved = curvfast.Factors.from_pretrained(tmp_path / "one" / "factors-1")
    assert all(torch.equal(saved[n].g_sum, layer.g_sum) for n, layer in callback.factors.items())


@pytest.mark.parametrize(
    "wrong",
    [
        {"every": 0}, {"steps": 0}, {"every": 2, "steps": 3}, {"fractions": []},
        {"fractions": [2.0]}, {"loss_scale": -1.0}, {"rows_per_step": 0},
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError):
        curvfast.CurvatureCallback(tmp_path, **wrong)
    if "loss_scale" in wrong:
        with pytest.raises(InputError, match="loss_scale"):
            CollectConfig(layers="mlp", **wrong)


# --- the log --------------------------------------------------------------------------------------


def test_a_resumed_training_goes_on_with_the_log(tmp_path: Path) -> None:
    model, examples = llama(attention_dropout=0.1), texts()
    records = []
    for name, stops in (("whole", []), ("cut", [5, 4])):
        own, resume = copy.deepcopy(model), None
        # The second training ends after 5 steps, and is taken up from its checkpoint at 4.
        for last in [*stops[:1], 8]:
            callback = curvfast.CurvatureCallback(
                tmp_path / name / "log", every=2, rows_per_step=0.5
            )
            train(
                own, examples, [callback], tmp_path / name, resume=resume, max_steps=last,
                save_strategy="steps", save_steps=2, gradient_accumulation_steps=2,
            )  # fmt: skip
            resume = str(tmp_path / name / "out" / "checkpoint-4")
        records.append(read_log(tmp_path / name / "log"))
    uninterrupted, resumed = records
    assert [record.step for record in resumed] == [0, 2, 4, 6]
    assert len({record.run for record in resumed}) == 1
    lines = (tmp_path / "cut" / "log" / FILE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 2, 4, 4, 6]
    for one, two in zip(uninterrupted, resumed, strict=True):
        assert (one.layers, one.loss) == (two.layers, two.loss)


def test_a_new_training_in_the_same_folder_is_a_run_of_its_own(tmp_path: Path) -> None:
    runs = []
    for steps in (3, 2):
        callback = curvfast.CurvatureCallback(tmp_path / "log", every=1)
        train(
            llama(), texts(), [callback], tmp_path, max_steps=steps, gradient_accumulation_steps=1
        )
        runs.append(read_log(tmp_path / "log"))
    assert [len(run) for run in runs] == [3, 2]
    assert read_log(tmp_path / "log", runs[0][0].run) == runs[0]


def test_the_end_of_a_training_ends_a_measurement(tmp_path: Path) -> None:
    callback = curvfast.CurvatureCallback(tmp_path / "log", every=4, steps=3)
    train(llama(), texts(), [callback], tmp_path, max_steps=6, gradient_accumulation_steps=1)
    records = read_log(tmp_path / "log")
    assert [(record.step, record.steps) for record in records] == [(0, 3), (4, 2)]
    rows = [next(iter(record.layers.values())).rows for record in records]
    assert rows[0] > rows[1]


def test_the_log_says_what_the_factors_hold(tmp_path: Path) -> None:
    factors, record = measured(llama(), texts(), tmp_path)
    basis = factors.eigh()
    assert (record.step, record.steps, record.processes) == (0, 1, 1)
    assert list(record.layers) == list(factors)
    kept = [basis.keep(fraction=fraction) for fraction in record.fractions]
    for name, layer in record.layers.items():
        assert (layer.d_out, layer.d_in) == (len(factors[name].G), len(factors[name].A))
        assert layer.rows == factors[name].rows_g
        assert layer.trace_a == pytest.approx(float(factors[name].A.trace()), rel=1e-5)
        assert layer.trace_g == pytest.approx(float(factors[name].G.trace()), rel=1e-5)
        assert layer.mass == pytest.approx([each[name].mass for each in kept], rel=1e-9)


def test_the_first_process_alone_measures(tmp_path: Path) -> None:
    model = llama()
    by_hand(model, [whole(texts())], curvfast.CurvatureCallback(tmp_path), first=False)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_to_write_never_stops_a_training_and_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from curvfast.kfac import spectrum_log

    original = spectrum_log.append

    def full_at_first(directory: Path, record: SpectrumRecord) -> None:
        if record.step < 2:
            raise CurvfastError("no space left")
        original(directory, record)

    monkeypatch.setattr(spectrum_log, "append", full_at_first)
    model, callback = llama(), curvfast.CurvatureCallback(tmp_path, every=1)
    by_hand(model, [whole(texts())] * 3, callback)
    (message,) = [r.getMessage() for r in caplog.records if r.name == "curvfast.hf.callback"]
    assert "at step 0 is not in" in message
    assert "no space left" in message
    assert [record.step for record in read_log(tmp_path)] == [2]
    assert callback.refusal is None
    assert hooks(model) == 0
