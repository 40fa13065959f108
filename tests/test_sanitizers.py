"""The native core under the compiler's own watch: addresses, undefined behaviour, threads."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("g++")


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
@pytest.mark.parametrize(("watch", "rounds"), [("address,undefined", 1000), ("thread", 100)])
def test_random_input_breaks_no_rule_of_the_language(
    tmp_path: Path, watch: str, rounds: int
) -> None:
    program = tmp_path / "fuzz"
    sources = [p for p in (ROOT / "csrc").glob("*.cpp") if p.name != "bindings.cpp"]
    subprocess.run(
        [
            COMPILER, "-std=c++20", "-O1", "-g", f"-fsanitize={watch}", "-fno-sanitize-recover=all",
            "-D_GLIBCXX_ASSERTIONS", "-Wall", "-Wextra", "-Werror", "-I", ROOT / "csrc",
            ROOT / "tests" / "native_fuzz.cpp", *sources, "-o", program, "-pthread",
        ],
        check=True,
    )  # fmt: skip
    done = subprocess.run([program, str(rounds)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{rounds} rounds\n"
