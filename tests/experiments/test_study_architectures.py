"""The study of other architectures, cut to seconds, and its recurrent and all-MLP models."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lab_data
import pytest
import torch
from oracle import assert_equal_factors, brute_force
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import curvfast
from curvfast.cli import main
from curvfast.evals.memorization import Passage, memorization
from curvfast.experiments.data.corpus import load_corpus
from curvfast.experiments.data.images import NoisySplit, noisy_split
from curvfast.experiments.models import lstm, mixer
from curvfast.experiments.models.lstm import Cell, LstmLm, LstmRecipe, new_lstm, trained_lstm
from curvfast.experiments.models.mixer import new_mixer, train_mixer, trained_mixer
from curvfast.experiments.models.vit import accuracies
from curvfast.experiments.recipes import RECIPES, Recipe
from curvfast.experiments.studies import architectures
from curvfast.model.layers import select

PNG = b"\x89PNG\r\n\x1a\n"
VOCABULARY = 61
LSTM = LstmRecipe(Recipe(seed=2)).quick()
MIXER = RECIPES["mnist"].quick()

# A few hundred rows, and factors of lesser rank.
pytestmark = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")


@pytest.fixture(scope="module", autouse=True)
def _here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        lab_data.install(patch, tmp_path_factory.mktemp("cache"))
        patch.setattr(architectures, "mnist", lab_data.pictures)
        yield


def small(cells: int = 2) -> LstmLm:
    return LstmLm(vocabulary=VOCABULARY, embedding=12, hidden=10, cells=cells)


def tokens(sequences: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (sequences, length), generator=generator)


def summed(output: Any, batch: dict[str, Tensor]) -> Tensor:
    """A prediction at every position, the last too."""
    return cross_entropy(output.logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")


@pytest.fixture
def batches() -> list[dict[str, Tensor]]:
    return [{"input_ids": tokens(n, 7, n), "labels": tokens(n, 7, n + 9)} for n in (3, 5)]


def truth(model: LstmLm, batches: list[dict[str, Tensor]]) -> Any:
    exact = [{"input_ids": b["input_ids"], "labels": b["labels"]} for b in batches]
    return brute_force(
        copy.deepcopy(model).double(), list(select(model, "cells.*")), exact,
        lambda batch: torch.ones(batch["input_ids"].shape, dtype=torch.bool), summed,
    )  # fmt: skip


def test_an_lstm_is_kept_by_what_its_training_depends_on() -> None:
    later = replace(LSTM, text=replace(LSTM.text, mass=0.5, statistics_tokens=9))
    assert LSTM.training_key() == later.training_key()
    others = [replace(LSTM, weight_decay=0.5), replace(LSTM, learning_rate=0.5)]
    others += [replace(LSTM, cells=3), replace(LSTM, text=replace(LSTM.text, seed=9))]
    assert len({each.training_key() for each in (LSTM, *others)}) == 5


def test_every_time_step_of_a_gate_is_a_row(batches: list[dict[str, Tensor]]) -> None:
    model = small()
    records = truth(model, batches)
    assert list(records) == [f"cells.{i}.{gate}" for i in (0, 1) for gate in ("inputs", "hidden")]
    assert {record.rows for record in records.values()} == {8 * 7}
    with curvfast.collect(model, "cells.*", loss_reduction="sum") as curvature:
        for batch in batches:
            summed(model(batch["input_ids"]), batch).backward()
    assert_equal_factors(curvature.factors(), records)


def test_a_driven_collection_counts_every_call_of_a_gate(batches: list[dict[str, Tensor]]) -> None:
    model = small()
    factors = curvfast.collect_from(model, batches, "cells.*", labels="gold", progress=False)
    assert_equal_factors(factors, truth(model, batches))


def test_sampled_labels_of_a_recurrent_model_are_one_a_position() -> None:
    model = small()
    told = {"skip_last": False, "progress": False}
    factors = curvfast.collect_from(model, [tokens(4, 6)], "cells.*", **told)
    assert factors.rows == 24
    # The state before the first token is zero: rows of zeros count as rows.
    assert factors["cells.0.hidden"].rows_a == factors["cells.0.hidden"].rows_g == 24


def test_gates_of_torchs_own_lstm_are_refused_by_name() -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(4, 3), "head": nn.Linear(3, 2)})
    with pytest.raises(curvfast.errors.LayerNotFound, match="LSTM: its fused kernels hide"):
        select(model, "rnn")


def test_a_cell_computes_what_torchs_own_does() -> None:
    cell, own = Cell(5, 4), nn.LSTM(5, 4, batch_first=True)
    with torch.no_grad():
        own.weight_ih_l0.copy_(cell.inputs.weight)
        own.weight_hh_l0.copy_(cell.hidden.weight)
        own.bias_ih_l0.copy_(cell.inputs.bias)
        own.bias_hh_l0.zero_()
    x, h, c = torch.randn(3, 6, 5), torch.randn(3, 4), torch.randn(3, 4)
    found, (h_end, c_end) = cell(x, (h, c))
    expected, (h_own, c_own) = own(x, (h[None], c[None]))
    for mine, theirs in ((found, expected), (h_end, h_own[0]), (c_end, c_own[0])):
        torch.testing.assert_close(mine, theirs)
    assert (cell.inputs.bias[4:8] == 1).all()


def test_a_sequence_read_in_parts_is_the_sequence_read_at_once() -> None:
    model, row = small(), tokens(2, 9)
    whole = model(row).logits
    first = model(row[:, :4], use_cache=True)
    rest = model(row[:, 4:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole)
    assert model(row).past_key_values is None


def test_padding_on_the_left_changes_no_continuation() -> None:
    model = small()
    long, short = tokens(1, 6, 1)[0].tolist(), tokens(1, 3, 2)[0].tolist()
    alone = [curvfast.evals.generation.greedy(model, [prefix], 5)[0] for prefix in (long, short)]
    assert curvfast.evals.generation.greedy(model, [long, short], 5) == alone
    padded = torch.tensor([[0] * 3 + short, long])
    mask = (padded != 0).long()
    torch.testing.assert_close(
        model(padded, attention_mask=mask).logits[:1, 3:], model(torch.tensor([short])).logits
    )


def test_the_loss_is_of_the_next_token_where_there_is_a_label() -> None:
    model, row = small(), tokens(2, 5)
    labels = row.clone()
    labels[0, :3] = -100
    losses = cross_entropy(model(row).logits[:, :-1].mT, row[:, 1:], reduction="none")
    scored = labels[:, 1:] != -100
    torch.testing.assert_close(model(row, labels=labels).loss, losses[scored].mean())


def test_an_lstm_learns_a_passage_by_heart() -> None:
    model, row = small(1), tokens(1, 12)
    passage = Passage(tuple(row[0, :4].tolist()), tuple(row[0, 4:].tolist()))
    assert memorization(model, [passage]).strict == 0
    batch = {"input_ids": row, "labels": row}
    model = lstm.fit(model, [batch] * 80, steps=80, learning_rate=0.03, weight_decay=0.0)
    assert memorization(model, [passage]).strict == 1


@pytest.fixture
def split() -> NoisySplit:
    first, second = lab_data.pictures()
    return noisy_split(first, second, train=200, fresh=100, validation=100, noise=0.3, seed=0)


def test_rows_of_a_mixer_are_channels_and_tokens(split: NoisySplit) -> None:
    model = new_mixer(MIXER)
    factors = curvfast.collect_from(
        model, [{"pixel_values": split.fresh.pixels}], "mlp", progress=False
    )
    sizes = {"token_mlp": MIXER.hidden, "channel_mlp": 4}
    assert len(factors) == 2 * 2 * MIXER.layers
    for name, layer in factors.items():
        assert layer.rows_a == layer.rows_g == 100 * sizes[name.split(".")[2]]


def test_tokens_and_channels_of_a_mixer_are_mixed_by_their_own_mlp() -> None:
    block = mixer.Block(tokens=4, tokens_mlp=6, hidden=5, mlp=7)
    x, other = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    other[:, 0] = x[:, 0]
    nn.init.zeros_(block.token_mlp.fc2.weight)
    torch.testing.assert_close(block(x)[:, 0], block(other)[:, 0])
    nn.init.ones_(block.token_mlp.fc2.weight)
    assert not torch.allclose(block(x)[:, 0], block(other)[:, 0])
    assert block(x).shape == x.shape


def test_a_mixer_learns_wrong_labels_by_heart_and_touches_no_global_state(
    split: NoisySplit,
) -> None:
    recipe = replace(MIXER, epochs=30, hidden=32, mlp=64, batch=50, weight_decay=0.0)
    recipe = replace(recipe, learning_rate=3e-3)
    state = torch.get_rng_state()
    model = train_mixer(recipe, split)
    assert torch.equal(torch.get_rng_state(), state)
    shares = accuracies(model, split)
    assert shares["memorized"] > 0.3
    assert shares["clean"] > 0.5
    assert not model.training


def test_models_are_kept_by_what_their_training_depends_on(
    split: NoisySplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = load_corpus(LSTM.text)
    first = [trained_lstm(LSTM, corpus), trained_mixer(MIXER, split)]
    monkeypatch.setattr(lstm, "train_lstm", None)
    monkeypatch.setattr(mixer, "train_mixer", None)
    for one, two in zip(
        first, [trained_lstm(LSTM, corpus), trained_mixer(MIXER, split)], strict=True
    ):
        assert not two.training
        for p, q in zip(one.parameters(), two.parameters(), strict=True):
            assert torch.equal(p, q)
    with pytest.raises(TypeError):
        trained_lstm(replace(LSTM, hidden=20), corpus)
    with pytest.raises(TypeError):
        trained_mixer(replace(MIXER, seed=8), split)
    assert not all(
        torch.equal(p, q)
        for p, q in zip(first[0].parameters(), new_lstm(LSTM).parameters(), strict=True)
    )


def test_the_study_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--quiet", "study", "architectures", "--quick", "--seeds", "0", "--out"]
    assert main([*command, str(tmp_path)]) == 0
    folder = tmp_path / "architectures"
    found = architectures_of(folder)
    assert list(found) == ["llama", "lstm", "vit", "mixer"]
    for each in found.values():
        assert [point["mass"] for point in each["sweep"]] == [0.8, 0.9, 0.95, 0.98, 0.99]
        kept = [point["kfac"]["kept_fraction"] for point in each["sweep"]]
        assert kept == sorted(kept)
        assert all(p["kfac"]["kept_fraction"] == p["svd"]["kept_fraction"] for p in each["sweep"])
        assert 0 <= each["base"]["memorized"] <= 1
    assert [each["layers"] for each in found.values()] == [6, 2, 4, 8]
    assert found["llama"]["base"]["quality"] > 1 >= found["mixer"]["base"]["quality"]
    assert (folder / "figure.png").read_bytes()[:8] == PNG
    printed = capsys.readouterr().out
    for title in architectures.TITLES.values():
        assert printed.count(f"\n{title}") == 2


def architectures_of(folder: Path) -> dict[str, Any]:
    from curvfast.experiments.studies.runs import read

    return dict(read(folder / "seed-0.json")["figures"])


def run(left: list[float]) -> dict[str, Any]:
    masses = (0.8, 0.9, 0.95)
    points = zip(masses, left, strict=True)
    return {
        "base": {"memorized": 0.9, "quality": 0.5},
        "quality": "validation",
        "sweep": [
            {
                "mass": mass,
                "kfac": {"memorized": share, "quality": share / 2, "kept_fraction": mass / 10},
                "svd": {"memorized": share / 4, "quality": share / 8, "kept_fraction": mass / 10},
            }
            for mass, share in points
        ],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("left", "mass"),
    [
        ([0.1, 0.3, 0.4], 0.9),
        ([0.0, 0.1, 0.2], 0.95),
        ([0.5, 0.6, 0.7], 0.8),
        ([0.1, 0.6, 0.2], 0.95),
    ],
)
def test_the_mildest_edit_that_leaves_a_third_is_compared(left: list[float], mass: float) -> None:
    assert architectures.chosen_mass(run(left)) == mass


def test_what_is_chosen_on_the_first_seed_is_judged_on_the_others() -> None:
    names = architectures.TITLES
    seeds = [{name: run(left) for name in names} for left in ([0.1, 0.2, 0.8], [0.4, 0.5, 0.6])]
    tables = architectures._tables(seeds)
    row = tables["all, ρ chosen on the first seed and judged on the others"][1]
    assert row == ["Llama: MLPs", "0.9", "9", "90", "50", "12", "50.0", "25.0", "6.2"]
    sweep = tables["LSTM: gates"]
    assert [line[0] for line in sweep] == ["ρ", "0.8", "0.9", "0.95"]
    assert sweep[1][3] == "25 ± 21"
    alone = architectures._tables(seeds[:1])
    assert alone["all, ρ chosen on the first seed and judged on the others"][1][4] == "20"
