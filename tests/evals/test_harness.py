"""Tasks of lm-evaluation-harness: of the model in memory, and nothing of it or of us changed."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import json
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

import harness_stand_in as stand_in
import numpy as np
import pytest
import torch

from curvfast.errors import CurvfastError, InputError
from curvfast.evals import harness_scores
from curvfast.evals.choices import Choice, choice_accuracy
from curvfast.evals.lm_eval import find_tasks
from curvfast.hf.small import new_llama, train_tokenizer

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval, an extra"
)


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    stand_in.install(monkeypatch)
    return stand_in


@pytest.fixture(scope="module")
def subject() -> tuple[Any, Any]:
    tokenizer = train_tokenizer(["x"], 257)
    model = new_llama(vocabulary=257, hidden=16, mlp=24, layers=1, heads=2, length=64, seed=0)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)
    return model, tokenizer


def states() -> list[Any]:
    numpy = np.random.get_state()
    return [random.getstate(), numpy[1].tolist(), numpy[2:], torch.get_rng_state().tolist()]


def test_the_model_itself_is_asked_and_every_number_of_a_metric_is_told(harness, subject) -> None:
    model, tokenizer = subject
    found = harness_scores(model, tokenizer, "arc_easy, mmlu_*", limit=3, batch_size=5)
    tasks = ["arc_easy", "mmlu_anatomy", "mmlu_virology"]
    expected = {"acc": harness.level(model), "acc_stderr": 0.25, "exact_match,strict-match": 0.0}
    assert found == {f"{task}.{key}": v for task in tasks for key, v in expected.items()}
    assert all(type(value) is float for value in found.values())
    (call,) = harness.calls
    assert call.pop("model") is model
    assert call == {"batch": 5, "tasks": tasks, "limit": 3, "training": False}
    assert harness_scores(model, tokenizer, ["gsm8k"]).keys() == {f"gsm8k.{k}" for k in expected}
    assert harness.calls[1]["limit"] is None


def check_nothing_changes(subject, *arguments: Any, **options: Any) -> dict[str, float]:
    model, tokenizer = subject[0], copy.deepcopy(subject[1])
    # The harness gives one to a tokenizer that has none.
    tokenizer.pad_token = None
    model.train()
    model.model.layers[0].mlp.eval()
    random.seed(3)
    np.random.seed(3)
    before = states()
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    told = json.dumps([tokenizer.special_tokens_map, len(tokenizer), tokenizer.padding_side])
    found = harness_scores(model, tokenizer, *arguments, **options)
    assert states() == before
    modes = [name for name, module in model.named_modules() if not module.training]
    assert modes[0] == "model.layers.0.mlp"
    assert all(name.startswith(modes[0]) for name in modes)
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in model.named_parameters())
    assert weights.keys() == dict(model.named_parameters()).keys()
    now = [tokenizer.special_tokens_map, len(tokenizer), tokenizer.padding_side]
    assert json.dumps(now) == told
    return found


def test_generators_modes_weights_and_tokenizer_are_as_before(harness, subject) -> None:
    check_nothing_changes(subject, "arc_easy")
    before = states()
    with pytest.raises(InputError, match="hellaswag"):
        harness_scores(*subject, "hellaswag")
    assert states() == before


def test_what_cannot_be_asked_is_refused_with_a_reason(harness, subject, tmp_path) -> None:
    refusals = {
        r"no task 'arc_esay'; it knows arc_easy\. Its list: lm_eval ls tasks": {
            "tasks": "gsm8k,arc_esay"
        },
        r"no task 'zzz'\. Its list.*--lm-eval-include": {"tasks": "zzz"},
        "no task was named": {"tasks": " , "},
        "no folder '.*nowhere' of tasks": {"tasks": "gsm8k", "include": tmp_path / "nowhere"},
        "limit=0.*at least 1": {"tasks": "gsm8k", "limit": 0},
        "batch_size=0: pass at least 1": {"tasks": "gsm8k", "batch_size": 0},
    }
    for match, options in refusals.items():
        with pytest.raises(InputError, match=match):
            harness_scores(*subject, **options)
    assert not harness.calls
    match = "could not ask hellaswag: Couldn't reach 'hellaswag' on the Hub. Where.*include="
    with pytest.raises(InputError, match=match):
        harness_scores(*subject, "hellaswag")


def test_tasks_of_a_folder_are_known_beside_the_harnesss_own(harness, tmp_path) -> None:
    (tmp_path / "mine.yaml").touch()
    assert find_tasks("mine,gsm8k,m*e", include=tmp_path).tasks == ("mine", "gsm8k")


def test_without_the_library_the_extra_is_named(subject, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(CurvfastError, match=r"pip install 'curvfast\[lm-eval\]'"):
        harness_scores(*subject, "gsm8k")


@needs_harness
def test_the_stand_in_has_the_librarys_signatures() -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    def defaults(function: Any) -> dict[str, Any]:
        return {name: p.default for name, p in inspect.signature(function).parameters.items()}

    for ours, theirs in (
        (stand_in.simple_evaluate, simple_evaluate),
        (stand_in.HFLM.__init__, HFLM.__init__),
        (stand_in.TaskManager.__init__, TaskManager.__init__),
        (stand_in.TaskManager.match_tasks, TaskManager.match_tasks),
    ):
        assert defaults(ours).items() <= defaults(theirs).items()


QUESTIONS = [
    {"question": f"{a}{b}", "choices": [a + b, b + a, "q" + a, b + "z"], "answer": number % 4}
    for number, (a, b) in enumerate(zip("abcdefghij", "klmnopqrst", strict=True))
]


def write_task(folder: Path) -> None:
    """Write a task and its data, which no network is needed for."""
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS), encoding="utf-8")
    task = {
        "task": "letters", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {
            "data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")
        },
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "target_delimiter": "",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    # JSON is YAML.
    (folder / "letters.yaml").write_text(json.dumps(task), encoding="utf-8")


@pytest.fixture
def no_other_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the library the reading of its thousands of YAML files."""
    tasks = importlib.import_module("lm_eval.tasks")
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))


@needs_harness
@pytest.mark.usefixtures("no_other_tasks")
@pytest.mark.parametrize("limit", [None, 6])
def test_the_library_finds_the_accuracy_that_choices_have(subject, tmp_path, limit) -> None:
    model, tokenizer = subject
    write_task(tmp_path)
    found = check_nothing_changes(subject, "letters", include=tmp_path, limit=limit)

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    asked = QUESTIONS[:limit]
    choices = []
    for question in asked:
        answers = [ids(text) for text in question["choices"]]
        right = answers.pop(question["answer"])
        choices.append(Choice(ids(question["question"]), (right, *answers)))
    accuracy = choice_accuracy(model, choices)
    assert 0 < accuracy < 1
    error = (accuracy * (1 - accuracy) / (len(asked) - 1)) ** 0.5
    expected = {"letters.acc": accuracy, "letters.acc_stderr": error}
    assert found == pytest.approx(expected)


@needs_harness
@pytest.mark.usefixtures("no_other_tasks")
def test_data_that_the_library_cannot_have_is_said_to_be_missing(subject, tmp_path) -> None:
    write_task(tmp_path)
    (tmp_path / "questions.jsonl").unlink()
    with pytest.raises(InputError, match=r"could not ask letters: .*questions.jsonl"):
        harness_scores(*subject, "letters", include=tmp_path)
