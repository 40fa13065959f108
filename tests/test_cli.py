"""The command line: exit codes, and errors without a traceback."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from curvfast.cli import main
from curvfast.demo import lm
from curvfast.errors import DownloadError


def test_env_tells_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    for fact in ("curvfast", "torch", "transformers", "python", "native core", "cuda"):
        assert f"\n{fact}" in f"\n{printed}"


def test_a_failure_is_one_line_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise DownloadError("no index here")

    monkeypatch.setattr(lm, "run", fail)
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == "curvfast: no index here\n"


def test_an_interrupt_is_exit_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lm, "run", interrupt)
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
