"""The command line: exit codes, and errors without a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from curvfast.cli import main
from curvfast.errors import DownloadError
from curvfast.experiments.runs import demo_lm


def test_env_tells_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    for fact in ("curvfast", "torch", "transformers", "python", "native core", "cuda"):
        assert f"\n{fact}" in f"\n{printed}"


def test_plan_tells_whether_a_model_fits(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["plan", "gpt2", "--batch", "1", "--seq-len", "32", "--tokens", "3100"]
    assert main([*small, "--device-memory", "40GB", "--flops", "1TFLOP/s"]) == 0
    printed = capsys.readouterr().out
    assert "transformer.h.*.mlp.c_fc" in printed
    assert "fits in one pass" in printed.splitlines()[-1]
    assert main([*small, "--layers", "*.c_fc", "*.c_proj", "--device", "cpu", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["batches"] == 100
    assert len(plan["layers"]) == 36
    assert plan["device"] == "cpu"
    assert plan["seconds"] is None
    assert main(["plan", "gpt-2"]) == 1
    assert "built-in name: gpt2" in capsys.readouterr().err
    assert main(["plan", "gpt2", "--device-memory", "much"]) == 1
    assert "'80GiB'" in capsys.readouterr().err


def test_a_failure_is_one_line_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **options: object) -> None:
        raise DownloadError("no index here")

    monkeypatch.setattr(demo_lm, "run", fail)
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == "curvfast: no index here\n"


def test_an_interrupt_is_exit_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_lm, "run", interrupt)
    assert main(["demo"]) == 130


@pytest.mark.parametrize("arguments", [[], ["dmeo"], ["demo", "gpt"], ["-v", "-q", "env"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


@pytest.mark.parametrize(("level", "code"), [("loud", 2), ("debug", 0), ("", 0)])
def test_the_log_level_of_the_environment(level: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "curvfast", "env"],
        capture_output=True,
        text=True,
        check=False,
        env={"CURVFAST_LOG": level, "PATH": ""},
    )
    assert done.returncode == code
    assert ("CURVFAST_LOG='loud'" in done.stderr) == (level == "loud")
