"""What is installed is what is in git; importing is light; the folder kernels/ is no trap."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from nvcc import GENERATIONS, needs_nvcc

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


def copied(tmp_path: Path) -> Path:
    """Return a copy of the tree: a build leaves folders that a later build would pick up."""
    source = tmp_path / "source"
    for name in tracked():
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    return source


def build(tmp_path: Path, kind: str, **environment: str) -> Path:
    out = tmp_path / "dist"
    run(
        sys.executable, "-m", "build", kind, "--no-isolation", "--outdir", str(out), ".",
        cwd=copied(tmp_path), **environment,
    )  # fmt: skip
    (package,) = out.iterdir()
    return package


@pytest.mark.parametrize(
    ("environment", "extensions"),
    [
        ({"CURVFAST_NATIVE": "0"}, []),
        ({"CURVFAST_CUDA": "OFF"}, ["_C"]),
        pytest.param({}, ["_C", "_cuda"], marks=needs_nvcc),
    ],
    ids=["python", "native", "cuda"],
)
def test_the_wheel_holds_what_git_holds(
    tmp_path: Path, environment: dict[str, str], extensions: list[str]
) -> None:
    wheel = build(tmp_path, "--wheel", **environment)
    assert ("none-any" in wheel.name) == (not extensions)
    files = zipfile.ZipFile(wheel).namelist()
    expected = tracked("curvfast/*.py", "curvfast/**/*.py")
    expected |= {
        n.replace("kernels/src/", "curvfast/kernels/") for n in tracked("kernels/src/*.py")
    }
    assert {name for name in files if name.endswith(".py")} == expected
    assert {"curvfast/py.typed", "curvfast/_C.pyi", "curvfast/_cuda.pyi"} <= set(files)
    assert tracked("curvfast/report/templates/*") <= set(files)
    compiled = sorted(name for name in files if name.endswith((".so", ".pyd")))
    assert [name.split(".")[0] for name in compiled] == [f"curvfast/{n}" for n in extensions]
    assert any(name.endswith("licenses/LICENSE") for name in files)
    if "_cuda" in extensions:
        zipfile.ZipFile(wheel).extract(compiled[1], tmp_path)
        check_the_cuda_module(tmp_path / compiled[1])


def check_the_cuda_module(path: Path) -> None:
    """It imports where there is no CUDA, and holds machine code for each generation and PTX."""
    code = "import importlib.util as u; s = u.spec_from_file_location('_cuda', {!r}); "
    code += "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.__doc__)"
    assert "CUDA core" in run(sys.executable, "-c", code.format(str(path)))
    # A shared runtime would import here, where nvcc is, and not elsewhere.
    assert b"libcudart.so" not in path.read_bytes()
    tools = importlib.util.find_spec("triton")
    tool = tools and Path(tools.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if tool and tool.exists():
        code = re.findall(r"^arch = (\w+)$", run(str(tool), "-sass", str(path)), re.MULTILINE)
        assert set(code) == set(GENERATIONS)
        assert re.findall(r"(sm_\w+)\.ptx", run(str(tool), "-lptx", str(path))) == [
            *GENERATIONS[-1:]
        ]


def test_the_sdist_holds_what_a_build_and_its_tests_need(tmp_path: Path) -> None:
    files = tarfile.open(build(tmp_path, "--sdist")).getnames()
    inside = {name.partition("/")[2] for name in files}
    assert tracked("csrc", "kernels", "tests", "curvfast", "CMakeLists.txt", "setup.py") <= inside


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
@pytest.mark.parametrize("choice", ["ON", "AUTO"])
def test_without_nvcc_only_who_asks_for_cuda_is_refused(tmp_path: Path, choice: str) -> None:
    import pybind11

    done = subprocess.run(
        [
            "cmake", "-S", ROOT, "-B", tmp_path, f"-DCURVFAST_CUDA={choice}",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ],
        env={**os.environ, "CUDACXX": str(tmp_path / "no-nvcc")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode == 0) == (choice == "AUTO"), done.stderr
    if choice == "AUTO":
        assert "-- curvfast._cuda is not built: no working nvcc was found" in done.stdout
    else:
        assert "CURVFAST_CUDA=ON, but no working nvcc was found" in done.stderr


def old_cmake() -> str | None:
    """Return a CMake on PATH that knows no C++20 of nvcc, if there is one."""
    for folder in os.get_exec_path():
        path = shutil.which("cmake", path=folder)
        said = subprocess.run([path, "--version"], capture_output=True, text=True) if path else None
        if said and re.match(r"cmake version 3\.2[45]\.", said.stdout):
            return path
    return None


@needs_nvcc
@pytest.mark.skipif(old_cmake() is None, reason="needs a CMake of 3.24 or 3.25")
def test_a_cmake_too_old_for_cuda_builds_the_rest(tmp_path: Path) -> None:
    import pybind11

    command = [
        old_cmake(), "-S", ROOT, "-B", tmp_path, f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "curvfast._cuda is not built: CMake 3.2" in done.stdout


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
        "from curvfast.kfac.selection.staircase import staircase_by_mass as s;"
        "from curvfast import ops;"
        "print(ops.backends()['native'], s([2.0, 1.0], [3.0, 1.0], 0.5).widths.tolist())"
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
        if name.endswith((".png", ".json", ".safetensors", "LICENSE")):
            continue
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not [word for word in words if word in text], name
