"""The study of what comes back when arithmetic is taught again after an edit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lab_data
import pytest
import torch

from curvfast.cli import main
from curvfast.experiments.runs.lab_lm import KINDS
from curvfast.experiments.studies import recovery
from curvfast.experiments.studies.study import StudyConfig

pytestmark = pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")


@pytest.fixture(autouse=True)
def _here(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab_data.install(monkeypatch, cache)


class Counter(torch.nn.Module):
    """Its loss falls as its weight rises."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, seen: list[int], number: int) -> Any:
        seen.append(number)
        return type("Out", (), {"loss": -self.weight})


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["-q", "study", "recovery", "--quick", "--seeds", "2", "--out", str(tmp_path)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    file = tmp_path / "recovery" / "seed-2.json"
    found = json.loads(file.read_text(encoding="utf-8"))["figures"]
    assert found["recipe"]["text"]["seed"] == 2
    assert set(found["levels"]) == {*KINDS, "distance", "perplexity"}
    for method, points in found["curves"].items():
        assert [point["step"] for point in points] == found["steps"] == [0, 10]
        perplexity, distance = (found["levels"][key][method] for key in ("perplexity", "distance"))
        assert perplexity[0] != perplexity[1]
        assert all(0 < far <= 1 for far in distance)
    first = {method: points[0]["perplexity"] for method, points in found["curves"].items()}
    assert len(set(first.values())) == 3
    assert file.stat().st_size < 200_000
    assert (tmp_path / "recovery" / "figure.png").is_file()
    assert printed.startswith("\nrecovery: arithmetic taught again after an edit")
    assert "in kind" not in printed


def test_each_arm_starts_from_the_unedited_weights_and_learns_the_same_sums(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    starts, lessons, tasks = [], [], []
    rows = recovery.lesson_batches

    def spying(tokenizer, chosen, **options):
        tasks.append({task.kind for task in chosen})
        return rows(tokenizer, chosen, **options)

    def relearn(model, batches, measure, steps):
        starts.append([value.clone() for value in model.state_dict().values()])
        lessons.append(next(batches)["input_ids"])
        with torch.no_grad():
            next(model.parameters()).add_(1)
        kinds = {f"{name}.generated": 0.0 for name in names}
        return [{"memorization": 0.0, "distance": 0.0, "perplexity": 1.0, **kinds}]

    names = [task.name for task in recovery.tasks_of(recovery.LmRecipe().quick())]
    monkeypatch.setattr(recovery, "lesson_batches", spying)
    monkeypatch.setattr(recovery, "relearn", relearn)
    recovery.STUDY.measure(StudyConfig(0, True, lambda line: None))
    assert tasks == [{"arithmetic"}] * 3
    assert all(torch.equal(lessons[0], other) for other in lessons[1:])
    base, *edits = starts
    for edited in edits:
        same = [torch.equal(one, two) for one, two in zip(base, edited, strict=True)]
        # Two blocks, three matrices each.
        assert same.count(False) == 6


def test_a_model_is_measured_after_the_steps_it_says() -> None:
    model, seen = Counter(), []
    levels = []

    def measure(model: Any) -> dict[str, float]:
        levels.append(len(seen))
        return {"weight": model.weight.item()}

    batches = ({"seen": seen, "number": i} for i in range(100))
    found = recovery.relearn(model, batches, measure, (0, 3, 7))
    assert [point["step"] for point in found] == levels == [0, 3, 7]
    assert seen == list(range(7))
    weights = [point["weight"] for point in found]
    assert weights[0] == 0 < weights[1] < weights[2] == model.weight.item()
    assert weights[2] <= 7 * recovery.LEARNING_RATE


def test_levels_are_means_over_the_tasks_of_a_kind() -> None:
    own = ("arithmetic", "arithmetic", "closed_book", "open_book", "logic")
    kinds = dict(zip("abcde", own, strict=True))
    point = {f"{name}.generated": i / 10 for i, name in enumerate("abcde")}
    point |= {"memorization": 0.5, "distance": 0.3, "perplexity": 12.0}
    found = recovery.levels({"kfac": [point, point]}, kinds)
    assert {kind: own["kfac"][1] for kind, own in found.items()} == {
        "memorization": 0.5, "arithmetic": 0.05, "closed_book": 0.2, "open_book": 0.3, "logic": 0.4,
        "distance": 0.3, "perplexity": 12.0,
    }  # fmt: skip


def test_tables_are_by_kind_over_steps_with_spreads() -> None:
    def run(level: float) -> dict[str, Any]:
        kinds = (*KINDS, "distance", "perplexity")
        methods = {method: [level, 2 * level] for method in recovery.METHODS}
        return {"steps": [0, 10], "levels": dict.fromkeys(kinds, methods)}

    tables = recovery.STUDY.tables([run(0.1), run(0.3)])
    assert tables["arithmetic"][0] == ["arithmetic, %", "0 steps", "10 steps"]
    assert tables["arithmetic"][1] == ["unedited", "20 ± 14", "40 ± 28"]
    assert tables["distance"][2] == ["K-FAC edit", "0.20 ± 0.14", "0.40 ± 0.28"]
