"""The modules of the library as syntax trees, and what each imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "curvfast"
KERNELS = ROOT / "kernels" / "src"


def modules() -> dict[str, ast.Module]:
    """Return the trees by dotted name without ``curvfast.``; the kernels are ``kernels``."""
    found = {}
    for base, prefix in ((PACKAGE, []), (KERNELS, ["kernels"])):
        for path in sorted(base.rglob("*.py")):
            parts = [*prefix, *path.relative_to(base).with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.setdefault(name, ast.parse(path.read_text(encoding="utf-8")))
    return found


def imports(tree: ast.Module, *, lazy: bool = True) -> Iterator[str]:
    """Yield dotted names as they are imported; ``lazy=False`` only what loads at once."""
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif lazy or not (isinstance(node, ast.FunctionDef) or _guards_types(node)):
            todo += ast.iter_child_nodes(node)


def _guards_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
