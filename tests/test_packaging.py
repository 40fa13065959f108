"""What is installed is what is in git; importing is light; the folder kernels/ is no trap."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import curvfast

ROOT = Path(__file__).parents[1]
_HELP = """
from curvfast.cli import main
try:
    main([{}])
except SystemExit:
    pass
"""


def run(*command: str, cwd: Path = ROOT, **env: str) -> str:
    # Interpreter and build tools of the running environment come first.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PATH": path, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tracked(*patterns: str) -> set[str]:
    return set(run("git", "ls-files", *patterns).split())


def build(tmp_path: Path, native: str) -> list[str]:
    # From a copy: a build in the tree leaves folders that a later build would pick up.
    source = tmp_path / "source"
    for name in tracked():
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    out = tmp_path / "dist"
    run(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), ".",
        cwd=source, CURVFAST_NATIVE=native,
    )  # fmt: skip
    (wheel,) = out.glob("*.whl")
    assert ("none-any" in wheel.name) == (native == "0")
    return zipfile.ZipFile(wheel).namelist()


@pytest.mark.parametrize("native", ["0", "1"])
def test_the_wheel_holds_what_git_holds(tmp_path: Path, native: str) -> None:
    files = build(tmp_path, native)
    expected = tracked("curvfast/*.py", "curvfast/**/*.py")
    expected |= {
        n.replace("kernels/src/", "curvfast/kernels/") for n in tracked("kernels/src/*.py")
    }
    assert {name for name in files if name.endswith(".py")} == expected
    assert {"curvfast/py.typed", "curvfast/_C.pyi"} <= set(files)
    compiled = [name for name in files if name.endswith((".so", ".pyd"))]
    assert bool(compiled) == (native == "1")
    assert all(name.startswith("curvfast/_C") for name in compiled)
    assert any(name.endswith("licenses/LICENSE") for name in files)


def test_the_kernels_folder_is_never_a_package_of_that_name() -> None:
    """transformers imports a distribution called kernels: ours must not be found as one."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = (
        "import importlib.util as u; s = u.find_spec('kernels');"
        "assert s is None or s.origin is None, s.origin"
    )
    run(sys.executable, "-c", code)
    assert "GPU kernels" in run(
        sys.executable, "-c", "import curvfast.kernels as k; print(k.__doc__)"
    )


@pytest.mark.parametrize(
    "code",
    [
        "import curvfast; curvfast.__version__; dir(curvfast)",
        _HELP.format("'--help'"),
        _HELP.format("'demo', '--help'"),
    ],
    ids=["import", "help", "demo-help"],
)
def test_importing_and_helping_do_not_load_torch(code: str) -> None:
    heavy = "import sys; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    assert run(sys.executable, "-c", f"{code}\n{heavy}").strip().endswith("[]")


def test_public_names_are_typed_and_load() -> None:
    tree = ast.parse((ROOT / "curvfast" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.asname: node.module.removeprefix("curvfast.")
        for node in block.body
        for alias in node.names
    }
    assert typed == curvfast._HOMES
    for name in curvfast._HOMES:
        assert getattr(curvfast, name).__name__ == name
        assert name in dir(curvfast)
    with pytest.raises(AttributeError, match="no attribute 'colect'"):
        _ = curvfast.colect


def test_the_twin_takes_over_without_a_compiler() -> None:
    code = (
        "from curvfast.core.selection import staircase_by_mass as s; from curvfast import ops;"
        "print(ops.native_status(), s([2.0, 1.0], [3.0, 1.0], 0.5).widths.tolist())"
    )
    assert run(sys.executable, "-c", code, CURVFAST_NATIVE="0").strip() == (
        "CURVFAST_NATIVE=0 is set [1, 0]"
    )


def test_the_tree_names_no_machine() -> None:
    """Paths of a machine and hosts of package indexes have no place in the tree."""
    words = [f"/{folder}/" for folder in ("work", "farm", "root")] + [
        "pypi" + ".org",
        "python" + "hosted",
    ]
    for name in tracked():
        if name.endswith((".png", ".json", "LICENSE")):
            continue
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not [word for word in words if word in text], name
