"""A training that is cut off goes on to the same bits, and says how far it is.

Run as a program, ``python test_fitting.py FOLDER STEP``, it trains until it is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lab_data
import pytest
import torch
from torch import Tensor, nn

from curvfast.display import Bar
from curvfast.experiments.data.corpus import load_corpus
from curvfast.experiments.models import cache, training_state
from curvfast.experiments.models.cache import cached
from curvfast.experiments.models.language import snapshots, trained_model
from curvfast.experiments.models.training import fit
from curvfast.experiments.recipes import Recipe

STEPS = 25
# Of 25 steps, those that end a tenth and are not the last.
KEPT_AT = [3, 5, 8, 10, 13, 15, 18, 20, 23]


class Net(nn.Module):
    """Two layers that share a weight, a buffer that training moves, and a weight it never uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.idle = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> SimpleNamespace:
        self.seen += x.mean()
        return SimpleNamespace(loss=(self.second(self.first(x).tanh()) - self.seen).square().mean())


def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Net()


class CutOff(Exception):
    """Stands for whatever ends a process."""


def cut() -> None:
    raise CutOff


def batches(
    until: int = STEPS, end: Callable[[], None] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Yield the batches of ``until`` steps, then end the training."""
    generator = torch.Generator().manual_seed(4)
    for _ in range(until):
        yield {"x": torch.randn(4, 5, generator=generator)}
    if end is not None:
        end()


def trained(data: Iterator[dict[str, Tensor]], folder: Path | None = None, **more: Any) -> Net:
    rates = {"learning_rate": 0.1, "weight_decay": 0.1}
    found: Net = fit(net(), data, steps=STEPS, unfinished=folder, **rates, **more)
    return found


def bits(model: nn.Module) -> dict[str, Tensor]:
    return model.state_dict()


def same(one: nn.Module, two: nn.Module) -> bool:
    first, second = bits(one), bits(two)
    return list(first) == list(second) and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("until", [1, 3, 7, 24])
def test_a_training_cut_off_goes_on_to_the_same_bits(tmp_path: Path, until: int) -> None:
    with pytest.raises(CutOff):
        trained(batches(until, cut), tmp_path)
    taken: list[int] = []
    found = trained(batches(), tmp_path, after=lambda model, step: taken.append(step))
    assert same(found, trained(batches()))
    begun = max([0, *(step for step in KEPT_AT if step <= until)])
    # Nothing is trained twice but what came after the last state; step 0 is the untrained model.
    assert taken == list(range(begun + 1 if begun else 0, STEPS + 1))
    assert not same(found, net())


def test_a_process_killed_twice_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    for until in (6, 14):
        done = subprocess.run([sys.executable, __file__, tmp_path, str(until)], check=False)
        assert done.returncode == -signal.SIGKILL
    said: list[str] = []
    assert same(trained(batches(), tmp_path, report_stage=said.append), trained(batches()))
    assert said[0] == "going on after step 13 of 25, where an earlier run was cut off"


def test_a_state_is_json_and_safetensors(tmp_path: Path) -> None:
    """Nothing that is read from it is ever executed."""
    trained(batches(), tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]


@pytest.mark.parametrize("change", ["damaged", "other torch", "other model"])
def test_a_state_that_does_not_fit_is_none(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if change == "other torch":
        monkeypatch.setattr(training_state.torch, "__version__", "1.0")
    with pytest.raises(CutOff):
        trained(batches(12, cut), tmp_path)
    monkeypatch.undo()
    (file,) = tmp_path.glob("*.safetensors")
    if change == "damaged":
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    if change == "other model":
        monkeypatch.setattr(sys.modules[__name__], "Net", lambda: Wider())
    taken: list[int] = []
    found = trained(batches(), tmp_path, after=lambda model, step: taken.append(step))
    assert taken == list(range(STEPS + 1))
    assert same(found, trained(batches()))


class Wider(Net):
    """A later version of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.ones(4))


def test_a_state_is_kept_until_the_model_is_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "cache_dir", lambda: tmp_path)

    def model(data: Iterator[dict[str, Tensor]]) -> Net:
        return cached(
            "kind", "key",
            read=lambda folder: torch.nn.Module(),
            make=lambda unfinished: trained(data, unfinished),
            write=lambda made, folder: training_state.keep(
                folder, made, torch.optim.SGD(made.parameters()), STEPS
            ),
        )  # fmt: skip

    with pytest.raises(CutOff):
        model(batches(12, cut))
    assert [path.name for path in (tmp_path / "kind").iterdir()] == [".unfinished-key"]
    assert same(model(batches()), trained(batches()))
    assert [path.name for path in (tmp_path / "kind").iterdir()] == ["key"]


def test_the_demos_model_and_its_snapshots_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from curvfast.experiments.models import language

    recipe, steps = Recipe(seed=3).quick(), [0, 2, 5, 6]
    lab_data.install(monkeypatch, tmp_path / "whole")
    corpus = load_corpus(recipe)
    whole, moments = trained_model(recipe, corpus), snapshots(recipe, corpus, steps)
    monkeypatch.setenv("CURVFAST_CACHE", str(tmp_path / "cut"))
    every = language.training_batches

    def until_four(*given: Any) -> Iterator[dict[str, Any]]:
        for number, batch in enumerate(every(*given)):
            if number == 4:
                raise CutOff
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(language, "training_batches", until_four)
        with pytest.raises(CutOff):
            trained_model(recipe, corpus)
        with pytest.raises(CutOff):
            snapshots(recipe, corpus, steps)
    said: list[str] = []
    assert same(trained_model(recipe, corpus, said.append), whole)
    assert said[0].startswith("going on after step 4 of 6")
    again = snapshots(recipe, corpus, steps, said.append)
    assert sum(line.startswith("going on") for line in said) == 2
    assert list(again) == list(moments)
    for step, weights in moments.items():
        assert all(torch.equal(again[step][name], weights[name]) for name in weights)


def test_where_no_bar_is_shown_each_tenth_is_a_line() -> None:
    said: list[str] = []
    trained(batches(), report_stage=said.append)
    assert [int(line.split()[1]) for line in said] == [*KEPT_AT, STEPS]
    assert said[0].startswith("train: 3 of 25 steps (12%), loss ")


def test_a_bar_and_a_line_are_never_both_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with Bar("train", 3, "step", enabled=False, report_stage=said.append) as bar:
        bar.advance(3)
    assert said == []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    trained(batches(), report_stage=said.append)
    assert said == []


if __name__ == "__main__":
    trained(
        batches(int(sys.argv[2]), lambda: os.kill(os.getpid(), signal.SIGKILL)), Path(sys.argv[1])
    )
