"""The tests of the GPU as a case: a row a test, as soon as it ended, with its failure's text."""

from __future__ import annotations

import importlib.util
import os
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_MOST_TEXT = 8000


class _Reporter:
    """A pytest plugin that passes on how each test ended; xdist's processes report to it too."""

    def __init__(self, rows: queue.SimpleQueue[dict[str, Any] | None]) -> None:
        self._rows = rows

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            row = {
                "test": report.nodeid, "outcome": report.outcome,
                "seconds": round(report.duration, 2),
            }  # fmt: skip
            if report.outcome != "passed":
                row["text"] = str(report.longrepr)[-_MOST_TEXT:]
            self._rows.put(row)


def run_tests(selected: str = "", processes: str = "8") -> Iterator[dict[str, Any]]:
    """Run tests/ops/test_gpu.py, or what ``selected`` (pytest's -k) names of it.

    Raises:
        AssertionError: At the end, if a test failed or none ran.
    """
    import pytest

    rows: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    arguments = [
        str(ROOT / "tests" / "ops" / "test_gpu.py"), "-q", "-o", "addopts=",
        "--import-mode=importlib", "-p", "no:cacheprovider",
        "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"),
    ]  # fmt: skip
    if selected:
        arguments += ["-k", selected]
    if int(processes) > 1 and importlib.util.find_spec("xdist"):
        arguments += ["-n", processes]
    os.environ.pop("CURVFAST_BACKEND", None)
    codes: list[int] = []

    def run() -> None:
        try:
            codes.append(int(pytest.main(arguments, plugins=[_Reporter(rows)])))
        finally:
            rows.put(None)

    # In a thread, so that rows are told while the tests run.
    thread = threading.Thread(target=run)
    thread.start()
    ended: dict[str, int] = {}
    while (row := rows.get()) is not None:
        ended[row["outcome"]] = ended.get(row["outcome"], 0) + 1
        yield row
    thread.join()
    code = codes[0] if codes else "none: pytest itself failed"
    yield {"summary": ended, "exit_code": code}
    assert code == 0, f"pytest ended with exit code {code}: {ended}"
