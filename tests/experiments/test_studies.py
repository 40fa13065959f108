"""Studies: from the command line, seed by seed, kept on disk and not measured twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lab_data
import pytest

from curvfast.cli import main
from curvfast.errors import InputError, StorageError
from curvfast.experiments.runs import demo_smollm
from curvfast.experiments.studies import figure3, runs
from curvfast.experiments.studies.names import NAMES
from curvfast.experiments.studies.runs import STUDIES
from curvfast.experiments.studies.study import Study, StudyConfig, spread

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def _here(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab_data.install(monkeypatch, cache)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[StudyConfig]:
    """A study that measures its seed, and what it was asked for."""
    configs: list[StudyConfig] = []

    def measure(config: StudyConfig) -> dict[str, Any]:
        configs.append(config)
        return {"tenfold": 10 * config.seed}

    def picture(found: Sequence[dict[str, Any]]) -> Any:
        from matplotlib.figure import Figure

        return Figure()

    study = Study(measure, lambda found: {"all": [["figures", str(found)]]}, picture)
    monkeypatch.setitem(STUDIES, "figure3", study)
    return configs


def run(folder: Path, *seeds: int, **options: Any) -> list[dict[str, Any]]:
    return runs.run("figure3", seeds, folder, lambda line: None, **options)


def test_every_study_has_a_name_and_every_name_a_study() -> None:
    assert list(NAMES) == list(STUDIES)


@pytest.mark.parametrize("name", ["figure3", "table2"])
def test_a_study_of_the_lab_from_the_command_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["-q", "study", name, "--quick", "--seeds", "0", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"\n{name}: {NAMES[name][0]} ({NAMES[name][1]} in kind)\n")
    assert "±" in printed
    for seed in (0, 1):
        found = json.loads((tmp_path / name / f"seed-{seed}.json").read_text(encoding="utf-8"))
        assert (found["study"], found["seed"], found["quick"]) == (name, seed, True)
        assert found["command"] == f"curvfast study {name} --seeds {seed} --quick"
    assert (tmp_path / name / "figure.png").read_bytes()[:8] == PNG


def test_table_2_is_of_each_recipe_and_its_seed(tmp_path: Path) -> None:
    found = runs.run("table2", [3], tmp_path, lambda line: None, quick=True)
    recipes = {name: own["recipe"] for name, own in found[0].items()}
    assert list(recipes) == ["mnist", "fashion", "overfit"]
    assert [recipe["data"] for recipe in recipes.values()] == ["mnist", "fashion", "fashion"]
    assert {recipe["seed"] for recipe in recipes.values()} == {3}
    lines = STUDIES["table2"].tables(found)["overfit"]
    kfac = next(line for line in lines if line[0] == "K-FAC edit")
    assert kfac[1] == f"{100 * found[0]['overfit']['kfac']['memorized']:.1f}"


def test_a_seed_on_disk_is_not_measured_again(asked: list[StudyConfig], tmp_path: Path) -> None:
    assert run(tmp_path, 0, 1) == [{"tenfold": 0}, {"tenfold": 10}]
    assert run(tmp_path, 1, 2) == [{"tenfold": 10}, {"tenfold": 20}]
    assert [config.seed for config in asked] == [0, 1, 2]
    run(tmp_path, 1, again=True)
    assert asked[-1].seed == 1


def test_a_quick_run_is_never_taken_for_a_full_one(
    asked: list[StudyConfig], tmp_path: Path
) -> None:
    run(tmp_path, 0, quick=True)
    run(tmp_path, 0)
    assert [config.quick for config in asked] == [True, False]
    run(tmp_path, 0)
    assert len(asked) == 2


def test_a_killed_run_keeps_the_seeds_it_measured(
    asked: list[StudyConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = STUDIES["figure3"]

    def dies(config: StudyConfig) -> dict[str, Any]:
        if config.seed == 1:
            raise KeyboardInterrupt
        return whole.measure(config)

    monkeypatch.setitem(STUDIES, "figure3", Study(dies, whole.tables, whole.picture))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 0, 1)
    monkeypatch.setitem(STUDIES, "figure3", whole)
    run(tmp_path, 0, 1)
    assert [config.seed for config in asked] == [0, 1]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"schema_version": 1}', '{"schema_version": 99, "figures": {}}']
)
def test_a_file_that_is_no_study_is_refused_and_left(
    content: str, asked: list[StudyConfig], tmp_path: Path
) -> None:
    path = tmp_path / "figure3" / "seed-0.json"
    path.parent.mkdir()
    path.write_text(content, encoding="utf-8")
    with pytest.raises(StorageError, match=r"seed-0\.json"):
        run(tmp_path, 0)
    assert path.read_text(encoding="utf-8") == content
    assert not asked


@pytest.mark.parametrize("seeds", [(), (1, 1)])
def test_seeds_are_one_or_more_each_once(seeds: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="each once"):
        run(tmp_path, *seeds)


def test_all_studies_run_one_after_another(
    asked: list[StudyConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name in NAMES:
        monkeypatch.setitem(STUDIES, name, STUDIES["figure3"])
    assert main(["-q", "study", "all", "--seeds", "4", "--out", str(tmp_path)]) == 0
    assert {path.parent.name for path in tmp_path.glob("*/seed-4.json")} == set(NAMES)
    assert all(f"\n{name}: " in capsys.readouterr().out for name in list(NAMES)[:1])


def test_spread_is_mean_and_sample_standard_deviation() -> None:
    assert spread([1.0, 2.0, 3.0], "{:.1f}") == "2.0 ± 1.0"
    assert spread([0.25]) == "0.25"


def test_tables_of_a_page_are_of_every_seed_in_order(
    asked: list[StudyConfig], tmp_path: Path
) -> None:
    import tables_studies

    assert not tables_studies.tables(tmp_path)
    run(tmp_path, 10, 2)
    found = tables_studies.tables(tmp_path)
    assert found == {"study-figure3-all": [["figures", str([{"tenfold": 20}, {"tenfold": 100}])]]}


def test_figure_3_asks_of_each_kind_before_and_after(tmp_path: Path) -> None:
    found = runs.run("figure3", [0], tmp_path, lambda line: None, quick=True)[0]
    assert found["smollm"]["base"]["memorization"] == 1.0
    for own in found.values():
        kinds = {*own["tasks"].values()}
        assert kinds == {"arithmetic", "closed_book", "open_book", "logic"}
        for method in ("base", "kfac", "svd"):
            assert {f"{task}.generated" for task in own["tasks"]} < own[method].keys()
        assert own["kfac"]["kept_fraction"] == own["svd"]["kept_fraction"] < 1
    tables = STUDIES["figure3"].tables([found])
    assert list(tables) == ["smollm, kept", "smollm, levels", "lab, kept", "lab, levels"]
    recited = next(line for line in tables["smollm, levels"] if line[0] == "unedited")[1]
    assert recited == "100"


def test_questions_of_logic_follow_examples_that_are_never_asked() -> None:
    subject = lab_data.pretrained(demo_smollm.SmolLMRecipe().quick(), None)
    asked = figure3.logic_questions(subject.tokenizer, 5, 0)
    assert set(asked) == {"boolean", "ordering", "tracking"}
    for items in asked.values():
        assert len(items) == 5
        texts = [subject.tokenizer.decode(item.prefix) for item in items]
        examples = texts[0].rsplit("\n", 1)[0]
        assert examples.count("\n") == 3
        assert all(text.startswith(f"{examples}\n") for text in texts)
        assert all(text.count(text.split("\n")[-1]) == 1 for text in texts)
