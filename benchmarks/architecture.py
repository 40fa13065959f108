"""Size of the architecture: rooms and floors of the import graph, and the files a call runs in.

A *room* is a package of curvfast, or a module at its root; *floors* count the rooms on the longest
path of imports, and *arrows* the imports between rooms. A *journey* is one traced call of the
public API on a model of two linear layers: the files that run, and the moves between files, returns
included.

    python benchmarks/architecture.py
"""

from __future__ import annotations

import ast
import copy
import io
import sys
import threading
import tokenize
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "curvfast"
# Modules that hand names on, or hold none.
DOORS = ("__init__", "__main__", "_version")


def modules() -> dict[str, Path]:
    """Return every module of the package by its dotted name, without the kernels' link."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[1] != "kernels":
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[tuple[str, bool]]:
    """Yield the package's modules that a file imports, and whether at import time."""
    tree = ast.parse(path.read_text())
    late = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _types_only(node)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            while name and name not in known:
                name = name.rpartition(".")[0]
            if name and name != "curvfast":
                yield name, node not in late


def _types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def room(module: str) -> str:
    """Return the room of a module: its outermost folder, or itself if it is loose at the root."""
    return module.split(".")[1]


def graph() -> dict[str, set[str]]:
    """Return the rooms and, for each, those it imports, lazily or not."""
    known = modules()
    arrows: dict[str, set[str]] = {}
    for module, path in known.items():
        if module == "curvfast" or room(module) in DOORS:
            continue
        own = arrows.setdefault(room(module), set())
        own.update(room(name) for name, _ in imports(path, known))
    for name, others in arrows.items():
        others -= {name, *DOORS}
    return arrows


def folders() -> int:
    """Return how many folders and loose modules there are, folders within folders included."""
    inside = {path.parent for path in modules().values() if path.parent != PACKAGE}
    return len(inside) + sum(room(name) not in DOORS for name in _loose())


def _loose() -> list[str]:
    return [n for n, p in modules().items() if p.parent == PACKAGE and n != "curvfast"]


def cycles(arrows: dict[str, set[str]]) -> list[set[str]]:
    """Return the sets of nodes that reach each other."""
    reach = {name: _reachable(name, arrows) for name in arrows}
    found: list[set[str]] = []
    for name in arrows:
        circle = {other for other in reach[name] if name in reach.get(other, ())}
        if circle and circle not in found:
            found.append(circle)
    return found


def _reachable(name: str, arrows: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    todo = list(arrows.get(name, ()))
    while todo:
        other = todo.pop()
        if other not in seen:
            seen.add(other)
            todo.extend(arrows.get(other, ()))
    return seen


def floors(arrows: dict[str, set[str]]) -> int:
    """Return how many nodes lie on the longest way down of an acyclic graph."""
    heights: dict[str, int] = {}

    def height(name: str) -> int:
        if name not in heights:
            heights[name] = 1 + max(map(height, arrows.get(name, ())), default=0)
        return heights[name]

    return max(map(height, arrows))


def file_graph() -> dict[str, set[str]]:
    """Return the modules and, for each, those it imports at import time."""
    known = modules()
    return {
        module: {name for name, early in imports(path, known) if early} - {module}
        for module, path in known.items()
    }


def code_lines(path: Path) -> int:
    """Return the lines of a file that hold code: no docstring, no comment, no blank line."""
    source = path.read_text()
    held: set[int] = set()
    skipped = (
        tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
        tokenize.ENCODING, tokenize.ENDMARKER,
    )  # fmt: skip
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            held.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        # A string that stands alone is a docstring, of a module, a class, a function or a field.
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            held -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(held)


@dataclass
class Journey:
    """What ran of the package between entering and leaving the ``with`` block."""

    calls: int = 0
    deepest: int = 0
    moves: int = 0
    files: set[str] = field(default_factory=set)
    _stack: list[str] = field(default_factory=list)

    def __enter__(self) -> Journey:
        threading.setprofile(self._note)
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def rooms(self) -> set[str]:
        return {name.partition("/")[0] for name in self.files}

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if not name.startswith(f"{PACKAGE}/") or event not in ("call", "return"):
            return
        name = name.removeprefix(f"{PACKAGE}/")
        stack = self._stack
        if event == "call":
            self.calls += 1
            self.files.add(name)
            self.moves += bool(stack) and stack[-1] != name
            stack.append(name)
            self.deepest = max(self.deepest, len(stack))
        elif stack:
            stack.pop()
            self.moves += bool(stack) and stack[-1] != name


def journeys() -> dict[str, Journey]:
    """Return the journeys of the public API on a model of two layers, all caches warm."""
    import torch
    from torch import nn

    import curvfast

    found: dict[str, Journey] = {}

    def trace(name: str, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with Journey() as found[name]:
            return run(*args, **kwargs)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8))
    x, labels = torch.randn(40, 16), torch.randint(8, (40,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            with curvfast.collect(model, layers="all") as curvature:
                for _ in range(2):
                    y = trace("forward", model, x)
                    loss = nn.functional.cross_entropy(y, labels)
                    trace("backward", loss.backward)
            factors = trace("factors", curvature.factors)
            basis = trace("eigh", factors.eigh)
            trace("keep", basis.keep, mass=0.9)
            trace("edit", curvfast.edit, copy.deepcopy(model), basis, mass=0.9)
            trace("collect_from", curvfast.collect_from, model, [x, x], layers="all")
            trace("correct", curvfast.correct, model, basis, [x, x])
    return found


def method_files() -> set[str]:
    """Return the files that run from collecting to editing a two-layer Llama, imports apart."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import curvfast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 64, (4, 16))
    with warnings.catch_warnings(), Journey() as way:
        warnings.simplefilter("ignore")
        with curvfast.collect(model) as curvature:
            model(input_ids=tokens, labels=tokens).loss.backward()
        basis = curvature.factors().eigh()
        basis.keep(mass=0.9)
        curvfast.edit(model, basis, mass=0.9)
    return way.files


def main() -> None:
    """Print the figures."""
    arrows = graph()
    print(
        f"{len(arrows)} rooms ({folders()} with inner folders), {sum(map(len, arrows.values()))} "
        f"arrows, circles: {cycles(arrows) or 'none'}, circles of files at import: "
        f"{cycles(file_graph()) or 'none'}"
    )
    if not cycles(arrows):
        print(f"{floors(arrows)} floors")
    lengths = sorted(len(path.read_text().splitlines()) for path in modules().values())
    print(f"{len(lengths)} files, median {lengths[len(lengths) // 2]} lines, longest {lengths[-1]}")
    for name, way in journeys().items():
        print(
            f"{name:13} {way.calls:5} calls, {way.deepest:3} deep, {len(way.files):3} files, "
            f"{way.moves:4} moves, {len(way.rooms()):3} rooms"
        )
    path = method_files()
    lines = sum(code_lines(PACKAGE / name) for name in path)
    print(f"collect to edit: {len(path)} files, {lines} lines of code")


if __name__ == "__main__":
    main()
