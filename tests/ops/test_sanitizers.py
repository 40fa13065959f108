"""The native core under the compiler's own watch: addresses, undefined behaviour, threads.

The CUDA kernels too: on the CPU, one thread for each of theirs.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("g++")
# Program, and the sources it is linked with.
PROGRAMS = {
    "native_fuzz": [
        "gram_kernels.cpp", "split.cpp", "scores.cpp", "second_moment.cpp", "staircase.cpp",
    ],
    "triangle_fuzz": ["triangle.cpp"],
}  # fmt: skip


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
@pytest.mark.parametrize(
    ("program", "watch", "rounds"),
    [
        ("native_fuzz", "address,undefined", 1000),
        ("native_fuzz", "thread", 100),
        ("triangle_fuzz", "address,undefined", 100),
        ("triangle_fuzz", "thread", 20),
    ],
)
def test_random_input_breaks_no_rule_of_the_language(
    tmp_path: Path, program: str, watch: str, rounds: int
) -> None:
    fuzz = tmp_path / "fuzz"
    sources = [ROOT / "csrc" / name for name in PROGRAMS[program]]
    subprocess.run(
        [
            COMPILER, "-std=c++20", "-O1", "-g", f"-fsanitize={watch}", "-fno-sanitize-recover=all",
            "-D_GLIBCXX_ASSERTIONS", "-Wall", "-Wextra", "-Werror", "-I", ROOT / "csrc",
            ROOT / "tests" / "ops" / f"{program}.cpp", *sources, "-o", fuzz, "-pthread",
        ],
        check=True,
    )  # fmt: skip
    done = subprocess.run([fuzz, str(rounds)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{rounds} rounds\n"


def test_every_source_is_watched() -> None:
    found = {path.name for path in (ROOT / "csrc").glob("*.cpp")}
    watched = {name for names in PROGRAMS.values() for name in names}
    assert found - watched == {"bindings.cpp", "bindings_cuda.cpp"}
