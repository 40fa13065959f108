"""What every file keeps to: who prints, who draws random numbers, how long it may be."""

from __future__ import annotations

import ast

import pytest
from modules import PACKAGE, ROOT, imports, modules

import curvfast

MODULES = modules()
# Files over 400 lines, each with the reason why it is one idea; eight at most.
LONG: dict[str, str] = {}


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
