"""What the README shows is true: its code runs, its commands exist, its tables are the runs'."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cases import llama, token_batches

import curvfast
from curvfast.cli import main
from curvfast.hf.small import train_tokenizer
from curvfast.kfac.spectrum_log import read_log

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def write_text() -> Any:
    """Write the files its code reads; return a tokenizer made for them."""
    texts = [f"document {i} of the web, and {i * i} words about it" for i in range(40)]
    Path("web").mkdir()
    Path("books").mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    Path("web/a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    Path("books/b.txt").write_text(" ".join(texts))
    return train_tokenizer(texts, 300)


@pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")
def test_its_code_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    batches = token_batches()
    names: dict[str, Any] = {
        "model": llama(vocab_size=300), "loader": batches, "batches": batches,
        "tokenizer": write_text(), "task_batches": token_batches(sizes=(9, 9)),
        "passages": token_batches(), "other_texts": token_batches(sizes=(9, 9)),
    }  # fmt: skip
    before = names["model"].model.layers[0].mlp.up_proj.weight.clone()
    for block in blocks("python"):
        if "trainer" in block:
            continue
        exec(compile(block, "README.md", "exec"), names)
    assert not before.equal(names["model"].model.layers[0].mlp.up_proj.weight)
    edited = [layer["name"] for layer in names["report"].to_dict()["layers"]]
    assert edited == list(names["basis"])
    assert len(curvfast.Factors.from_pretrained("factors")) == 6
    assert names["factors"].provenance["data"]["corpora"][0]["weight"] == 0.9
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::curvfast.errors.NumericalWarning")
def test_its_code_for_the_trainer_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    monkeypatch.chdir(tmp_path)
    arguments = TrainingArguments(
        "out", use_cpu=True, max_steps=1, save_strategy="no", report_to=[], disable_tqdm=True
    )
    examples = [{k: v[0] for k, v in batch.items()} for batch in token_batches(sizes=(9, 9))]
    (block,) = (block for block in blocks("python") if "trainer" in block)
    trainer = Trainer(llama(), arguments, train_dataset=examples)
    exec(compile(block, "README.md", "exec"), {"curvfast": curvfast, "trainer": trainer})
    assert [record.steps for record in read_log("spectrum")] == [1]


def test_its_first_code_is_six_lines() -> None:
    lines = [line for line in blocks("python")[0].splitlines() if line]
    assert len(lines) == 6


def test_its_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"(?:^|`)make ([a-z-]+)", README, flags=re.M)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    commands = re.findall(r"`curvfast ([^`]+)`", README)
    assert commands
    for command in commands:
        with pytest.raises(SystemExit) as stopped:
            main([*shlex.split(command), "--help"])
        assert stopped.value.code == 0


def test_the_method_is_as_short_as_it_says() -> None:
    (bound,) = re.findall(r"under ([\d,]+) lines of code", README)
    # The suite interprets its kernels; a caller does not.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    printed = subprocess.run(
        [sys.executable, "benchmarks/architecture.py"], cwd=ROOT, capture_output=True, text=True,
        check=True, env=environment,
    ).stdout  # fmt: skip
    counted = re.fullmatch(
        r"collect to edit: \d+ files, (\d+) lines of code", printed.splitlines()[-1]
    )
    assert counted, printed
    assert 0 < int(counted[1]) < int(bound.replace(",", ""))


def test_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).is_file(), target


def test_every_table_is_what_the_runs_gave() -> None:
    import table

    for path in table.DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        assert table.filled(text) == text, f"{path.name}: run python benchmarks/table.py --write"


def test_a_table_that_no_run_made_is_refused() -> None:
    import table

    with pytest.raises(ValueError, match="no table 'invented'"):
        table.filled("<!-- invented -->\n<!-- /invented -->")
