"""What every file keeps to: who prints, who draws random numbers, how long it may be."""

from __future__ import annotations

import ast
import re

import pytest
from modules import PACKAGE, ROOT, imports, modules

import curvfast

MODULES = modules()
# Files over 400 lines, each with the reason why it is one idea; eight at most.
LONG = {
    "curvfast/collection/accumulator.py": "sums, and the pending step that may be taken back",
    "curvfast/collection/measurement.py": "what a caller may tell of a running measurement",
    "curvfast/model/counted.py": "how the rows of one call are explained, in the order of trust",
    "curvfast/model/token_streams.py": "calls around a layer, and the stream each inherits",
}


@pytest.mark.parametrize("name", [name for name in MODULES if name.split(".")[0] != "cli"])
def test_only_the_command_line_prints_or_configures_logging(name: str) -> None:
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("print", "logging.basicConfig"), f"{name} calls {called}"


@pytest.mark.parametrize("name", [name for name in MODULES if name.split(".")[0] == "cli"])
def test_the_command_line_imports_experiments_lazily(name: str) -> None:
    at_once = set(imports(MODULES[name], lazy=False))
    # The names of the studies are text alone: ``curvfast study --help`` lists them.
    at_once -= {"curvfast.experiments.studies.names.NAMES"}
    assert not [i for i in at_once if i.startswith(("curvfast.experiments", "torch"))]


def test_few_files_are_long() -> None:
    long = {
        str(path.relative_to(ROOT))
        for folder in ("curvfast", "kernels", "csrc", "benchmarks")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
        and path.read_bytes().count(b"\n") > 400
    }
    assert long == LONG.keys()
    assert len(LONG) <= 8


def test_no_module_shares_a_public_name() -> None:
    """A module curvfast/collect.py would replace curvfast.collect() once it is imported."""
    files = {path.stem for path in PACKAGE.iterdir()}
    assert not files & set(curvfast._HOMES)


def test_the_global_generator_is_never_drawn_from() -> None:
    """Random functions of torch take a generator of ours, except inside fork_rng."""
    drawing = {"torch.rand", "torch.randn", "torch.randint", "torch.randperm", "torch.multinomial"}
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in drawing:
                given = {keyword.arg for keyword in node.keywords}
                assert "generator" in given, f"{name}: {ast.unparse(node)}"


TESTS = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}


@pytest.mark.parametrize("name", ["LONGEST", "CORE", "BOTH_WAYS"])
def test_files_the_test_run_names_exist(name: str) -> None:
    # Read, not imported: a second copy of it would set the process up again.
    tree = ast.parse((ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"))
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
    )
    assert names
    assert set(names) <= TESTS


def test_files_the_makefile_names_exist() -> None:
    """Make's wildcard drops a name that no file has, without a word."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    lists = re.findall(r"\$\(call files,([^)]*)\)", makefile)
    assert len(lists) == 2
    for names in lists:
        assert {f"test_{name}" for name in names.split()} <= TESTS


def test_tests_left_out_of_the_interpreter_exist() -> None:
    """pytest drops a deselected test that nothing has, without a word."""
    text = (ROOT / "tests" / "without_interpreter.txt").read_text(encoding="utf-8")
    left_out = {line.removeprefix("--deselect=").partition("[")[0] for line in text.split()}
    assert left_out
    for path, *_, name in sorted(test.split("::") for test in left_out):
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert name in _functions(tree), f"{path} has no {name}"


def _functions(tree: ast.Module) -> set[str]:
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
