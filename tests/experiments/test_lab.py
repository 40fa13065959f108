"""The lab from the command line, cut to seconds; the whole is slow."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lab_data
import pytest
import torch
from lab_data import pictures

from curvfast import edit
from curvfast.cli import main
from curvfast.errors import DownloadError, InputError
from curvfast.experiments.data.images import CLASSES, SIDE, noisy_split
from curvfast.experiments.models import vit
from curvfast.experiments.models.vit import accuracies, train_vit
from curvfast.experiments.recipes import RECIPES, STATISTICS, LmRecipe, Statistics, VitRecipe
from curvfast.experiments.runs import lab_lm, lab_vit
from curvfast.experiments.runs.comparison import block_of, mlp_of, only, require_blocks
from curvfast.model.layers import select
from curvfast.model.rows import IGNORED_LABEL
from curvfast.report.curvature import read_curvature

SHARES = {"memorized", "ground_truth", "validation", "clean", "kept_fraction"}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def _here(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab_data.install(monkeypatch, cache)


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def tiny(**changes: Any) -> VitRecipe:
    return replace(
        RECIPES["mnist"].quick(), statistics=(Statistics(),), sweep=(), study=(), **changes
    )


def test_images_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--quiet", "lab", "vit", "--quick", "--blocks", "1", "--noise", "0.5"]
    assert main([*command, "--mass", "0.9", "--out", str(tmp_path)]) == 0
    found = results(tmp_path)
    printed = capsys.readouterr().out
    assert found["schema_version"] == 1
    assert found["versions"]["torch"] == torch.__version__
    assert found["recipe"]["noise"] == 0.5
    assert found["mass"] == 0.9
    assert found["command"] == (
        "curvfast lab vit mnist --seed 0 --noise 0.5 --mass 0.9 --blocks 1 --quick"
    )
    layers, _ = read_curvature(json.loads((tmp_path / "curvature.json").read_text("utf-8")))
    assert {block_of(name) for name in layers} == {1}
    for point in [found, *found["sweep"]]:
        for method in ("kfac", "svd", "random"):
            assert set(point[method]) == SHARES
            assert point[method]["kept_fraction"] == point["kfac"]["kept_fraction"]
    assert [point["mass"] for point in found["sweep"]] == [0.8, 0.9, 0.95]
    assert [arm["statistics"] for arm in found["statistics"]] == [
        vars(s) for s in RECIPES["mnist"].statistics
    ]
    target = found["kfac"]["kept_fraction"]
    assert all(
        arm["matched"]["kept_fraction"] == pytest.approx(target, abs=0.01)
        for arm in found["statistics"]
    )
    assert [part["blocks"] for part in found["blocks"]] == [[0], [1], [0, 1]]
    # Block 1 was the one to edit: the study of blocks gives the same figures for it.
    studied = {p["mass"]: p["kfac"] for p in found["blocks"][1]["sweep"]}
    assert studied == {p["mass"]: p["kfac"] for p in found["sweep"] if p["mass"] < 0.95}
    assert (tmp_path / "figures.png").read_bytes()[:8] == PNG
    for line in ("K-FAC edit", "training, cls, given", "0, 1 SVD"):
        assert f"\n{line}" in printed


def test_a_trained_model_is_kept_by_what_its_training_depends_on(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = lab_vit.run(tiny(), None, lambda line: None)
    kept = len(list((cache / "lab-vit").iterdir()))
    monkeypatch.setattr(vit, "train_vit", None)
    again = lab_vit.run(tiny(fresh_images=90), None, lambda line: None)
    assert again["base"] == first["base"]
    assert len(list((cache / "lab-vit").iterdir())) == kept
    with pytest.raises(TypeError):
        lab_vit.run(tiny(seed=1), None, lambda line: None)
    assert tiny().training_key() == tiny(mass=0.5, blocks=(0,)).training_key()
    assert tiny().training_key() != tiny(noise=0.1).training_key()


def test_training_takes_wrong_labels_for_right_and_touches_no_global_state() -> None:
    recipe = tiny(epochs=25, hidden=32, learning_rate=3e-3, weight_decay=0.0)
    first, second = pictures()
    split = noisy_split(first, second, train=200, fresh=100, validation=100, noise=0.3, seed=0)
    state = torch.get_rng_state()
    model = train_vit(recipe, split)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    shares = accuracies(model, split)
    assert shares["memorized"] + shares["ground_truth"] <= 1
    assert shares["clean"] > 0.5
    assert all(
        torch.equal(one, two)
        for one, two in zip(model.parameters(), train_vit(recipe, split).parameters(), strict=True)
    )


def test_every_picture_is_taught_its_given_label_once_an_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = pictures()
    split = noisy_split(first, second, train=200, fresh=100, validation=100, noise=0.5, seed=0)
    taught: list[tuple[float, int]] = []

    def fit(model, batches, *, steps, **_):
        given = list(batches)
        for batch in given:
            # The sum of its random pixels tells a picture.
            sums = batch["pixel_values"].flatten(1).double().sum(1).tolist()
            taught.extend(zip(sums, batch["labels"].tolist(), strict=True))
        assert len(given) == steps

    monkeypatch.setattr(vit, "fit", fit)
    train_vit(tiny(epochs=3), split)
    sums = split.train.pixels.flatten(1).double().sum(1).tolist()
    assert sorted(taught) == sorted(3 * list(zip(sums, split.given.tolist(), strict=True)))


def test_the_four_shares_are_of_their_pictures() -> None:
    first, second = pictures()
    split = noisy_split(first, second, train=50, fresh=10, validation=20, noise=0.4, seed=0)

    class Fixed(torch.nn.Module):
        """Gives the label trained on; of pictures never trained on, the true one of every other."""

        def forward(self, pixel_values: torch.Tensor) -> Any:
            found = split.given if len(pixel_values) == 50 else split.validation.labels.clone()
            if len(pixel_values) == 20:
                found[::2] = (found[::2] + 1) % CLASSES
            return type("Out", (), {"logits": torch.eye(CLASSES)[found]})

    assert accuracies(Fixed(), split) == {
        "memorized": 1.0, "ground_truth": 0.0, "validation": 0.5, "clean": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("statistics", STATISTICS, ids=str)
def test_statistics_are_of_the_pictures_tokens_and_labels_named(
    statistics: Statistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny()
    first, second = pictures()
    split = noisy_split(first, second, train=40, fresh=50, validation=20, noise=0.5, seed=0)
    model = train_vit(replace(recipe, train_images=40, epochs=1), split)
    seen: dict[str, Any] = {}
    real = lab_vit.collect_from

    def collect(model, batches, layers, **options):
        seen.update(options, pixels=torch.cat([b["pixel_values"] for b in batches]))
        seen["classes"] = torch.cat([b["labels"] for b in batches])
        seen["factors"] = real(model, batches, layers, **options)
        return seen["factors"]

    monkeypatch.setattr(lab_vit, "collect_from", collect)
    lab_vit.vit_basis(model, split, statistics, layers="mlp", seed=0)
    images = split.fresh if statistics.images == "fresh" else split.train
    assert torch.equal(seen["pixels"], images.pixels)
    given = split.given if statistics.images == "training" else images.labels
    assert torch.equal(seen["classes"], given)
    assert seen["labels"] == {"given": "gold", "sampled": "sampled"}[statistics.labels]
    tokens = 1 if statistics.tokens == "cls" else 1 + (SIDE // recipe.patch) ** 2
    layers = seen["factors"].layers.values()
    rows = {n for layer in layers for n in (layer.rows_a, layer.rows_g)}
    assert rows == {len(images) * tokens}


def test_cls_is_the_first_token() -> None:
    kept = lab_vit._cls("any layer", torch.Size([2, 3]))
    assert kept.tolist() == [[True, False, False]] * 2


def test_blocks_are_read_off_names() -> None:
    assert block_of("vit.layers.11.mlp.fc1") == 11
    assert block_of("classifier") == -1
    recipe = tiny()
    first, second = pictures()
    split = noisy_split(first, second, train=20, fresh=20, validation=20, noise=0.5, seed=0)
    model = train_vit(replace(recipe, train_images=20, epochs=1), split)
    assert {block_of(name) for name in select(model, mlp_of(None))} == {0, 1}
    assert list(select(model, mlp_of([1]))) == ["vit.layers.1.mlp.fc1", "vit.layers.1.mlp.fc2"]
    basis = lab_vit.vit_basis(model, split, Statistics(), layers="mlp", seed=0)
    assert {block_of(name) for name in only(basis, [0])} == {0}
    assert len(edit(model, only(basis, [0]), mass=0.5).layers) == 2


@pytest.mark.parametrize("blocks", [(2,), (-1,), ()])
def test_blocks_that_are_not_there_are_refused(blocks: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="has 2, 0 to 1"):
        require_blocks(blocks, 2)
    with pytest.raises(InputError, match="has 2, 0 to 1"):
        lab_vit.run(tiny(blocks=blocks), None, lambda line: None)


@pytest.mark.parametrize(
    "changes",
    [{"data": "cifar"}, {"statistics": ()}, {"statistics": (Statistics(tokens="some"),)}],
)
def test_what_cannot_be_run_is_said(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="pass"):
        lab_vit.run(replace(tiny(), **changes), None, lambda line: None)


def test_missing_pictures_are_one_line_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(folder: Path | None) -> None:
        raise DownloadError(f"nothing in {folder}")

    monkeypatch.setattr(vit, "fashion", missing)
    assert main(["-q", "lab", "vit", "fashion", "--data", "here"]) == 1
    assert capsys.readouterr().err == "curvfast: nothing in here\n"


def test_tasks_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--quiet", "lab", "lm", "--quick", "--lessons", "0.5", "--seed", "2"]
    assert main([*command, "--mass", "0.9", "--out", str(tmp_path)]) == 0
    found = results(tmp_path)
    printed = capsys.readouterr().out
    assert found["schema_version"] == 1
    assert found["versions"]["torch"] == torch.__version__
    assert found["recipe"]["statistics_lessons"] == 0.5
    assert found["recipe"]["text"]["seed"] == 2
    measures = {"memorization", "perplexity", "kept_fraction"}
    measures |= {f"{task}.{how}" for task in found["tasks"] for how in ("generated", "chosen")}
    for point in [found, *found["sweep"]]:
        for method in ("kfac", "svd"):
            assert set(point[method]) == measures
    assert [point["mass"] for point in found["sweep"]] == [0.8, 0.9, 0.95]
    assert set(found["tasks"].values()) | {"memorization"} == set(lab_lm.KINDS)
    for ways in found["kept"].values():
        assert set(ways["generated"]) == set(ways["chosen"]) == set(lab_lm.KINDS)
    assert (tmp_path / "figures.png").read_bytes()[:8] == PNG
    for line in ("passages recited", "tracking", "pairs kept", "truncated SVD, chosen"):
        assert f"\n{line}" in printed


def test_kept_is_accuracy_after_over_before_by_kind() -> None:
    kinds = {"a": "arithmetic", "b": "arithmetic", "c": "logic"}
    before = {"memorization": 0.8, "a.chosen": 0.6, "b.chosen": 1.0, "c.chosen": 0.0}
    after = {"memorization": 0.2, "a.chosen": 0.2, "b.chosen": 0.2, "c.chosen": 0.5}
    kept = lab_lm.kept_by_kind(before, after, kinds, "chosen")
    assert kept == pytest.approx({"memorization": 0.25, "arithmetic": 0.25, "logic": 0.0})


def test_no_passage_and_the_asked_share_of_lessons_are_in_the_statistics(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = LmRecipe().quick()
    corpus = lab_lm.corpus_of(recipe)
    seen: list[torch.Tensor] = []

    @dataclass(frozen=True)
    class Factors:
        provenance: dict[str, Any]

        def eigh(self) -> dict[str, Any]:
            return self.provenance

    def collect(model, batches, layers, **options):
        seen.append(torch.cat([b["input_ids"] for b in batches]))
        asked.append(torch.cat([b["labels"] for b in batches])[:, 1:].eq(IGNORED_LABEL).any(1))
        assert options["labels"] == "gold"
        assert not any(b["use_cache"] for b in batches)
        return Factors({"labels": "gold", "tokens": 3})

    asked: list[torch.Tensor] = []
    monkeypatch.setattr(lab_lm, "collect_from", collect)
    monkeypatch.setattr(lab_lm, "_own_labels", lambda model, batch, generator: batch["labels"])
    for share in (0.0, 1.0, 0.4):
        told = lab_lm.lm_basis(None, replace(recipe, statistics_lessons=share), corpus)
        assert told == {"labels": "sampled", "tokens": 3}
    lessons = [rows.double().mean() for rows in asked]
    assert lessons[0] == 0.0
    assert lessons[1] == 1.0
    assert 0.2 < lessons[2] < 0.7
    assert all(rows[:, 0].eq(0).all() for rows in seen)
    enough = recipe.text.statistics_tokens
    assert all(len(rows) * (recipe.text.length - 1) >= enough for rows in seen)
    with pytest.raises(InputError, match="share of the rows"):
        lab_lm.lm_basis(None, replace(recipe, statistics_lessons=2.0), corpus)


def test_perplexity_is_of_rows_that_begin_as_those_learnt_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held_out = torch.arange(1, 41).view(4, 10)
    corpus = SimpleNamespace(tokenizer=None, held_out=held_out, passages=list)
    seen = []
    monkeypatch.setattr(lab_lm, "memorization", lambda model, passages: SimpleNamespace(strict=0.0))
    monkeypatch.setattr(lab_lm, "perplexity", lambda model, parts: seen.append(torch.cat([*parts])))
    lab_lm.measure_of(LmRecipe(), corpus, ())(None)
    assert seen[0][:, 0].eq(0).all()
    assert torch.equal(seen[0][:, 1:], held_out[:, 1:])


def test_labels_are_drawn_from_the_model_where_there_is_something_to_learn() -> None:
    certain = torch.full((2, 5, 7), -1e4)
    certain[..., 3] = 0.0
    labels = torch.tensor([[4, 4, 4, 4, 4], [IGNORED_LABEL, IGNORED_LABEL, 4, IGNORED_LABEL, 4]])

    def model(input_ids, use_cache):
        assert not use_cache
        return SimpleNamespace(logits=certain)

    batch = {"input_ids": labels, "labels": labels}
    drawn = lab_lm._own_labels(model, batch, torch.Generator().manual_seed(0))
    none = IGNORED_LABEL
    assert drawn.tolist() == [[none, 3, 3, 3, 3], [none, none, 3, none, 3]]


def test_what_only_measures_retrains_no_language_model() -> None:
    recipe = LmRecipe()
    later = replace(recipe, mass=0.5, sweep=(), blocks=(0,), questions=3, statistics_lessons=0.5)
    assert recipe.training_key() == later.training_key()
    assert recipe.training_key() != recipe.seeded(1).training_key()
    assert recipe.training_key() != replace(recipe, people=3).training_key()
    assert recipe.quick().seeded(4).seed == recipe.seeded(4).quick().seed == 4
