"""The rules of the house: imports go down, third parties have one owner, files stay short."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "curvfast"
LONGEST = 300

# Low to high; a module imports its own floor's earlier entries and whatever is below.
FLOORS = [
    ["_version", "errors", "config", "progress", "tables"],
    ["kernels", "_C", "_cuda"],
    [
        "ops.registry",
        "ops.selection",
        "ops.projection",
        "ops.reference",
        "ops.reference_scores",
        "ops._native",
        "ops._native_cuda",
        "ops.native_triangle",
        "ops.panels",
        "ops.triangular",
        "ops.request",
        "ops.packed_rows",
        "ops.blocked",
        "ops.precision",
        "ops.corrections",
        "ops.moments",
        "ops.energies",
        "ops.sampling",
        "ops._library",
        "ops.launch",
        "ops.implementations",
        "ops",
    ],
    ["storage", "distributed"],
    [
        "data.reading",
        "data.parts",
        "data.corpus",
        "data.mixture",
        "data.shuffle",
        "data.settings",
        "data.stream",
        "data.tokenizing",
        "data.packing",
        "data.position",
        "data.batches",
        "data",
    ],
    [
        "core.by_layer",
        "core.rule",
        "core.mask",
        "core.factors",
        "core.corrections",
        "core.staircase",
        "core.selection",
        "core.scores",
        "core.layer_basis",
        "core.marginals",
        "core.tasks",
        "core.streams",
        "core.decomposition",
        "core.leading",
        "core.partial",
        "core.dealing",
        "core.eigenbasis",
        "core.eigh",
        "core.agreement",
        "core.projection",
        "core.singular",
        "core.importance",
        "core.interpolation",
        "core.spectrum",
        "core.power_law",
    ],
    [
        "adapters.layer",
        "adapters.linear",
        "adapters.patches",
        "adapters.experts",
        "adapters.refusals",
        "adapters.routing",
        "adapters",
        "layers",
        "rows",
        "own_loss",
        "thinning",
        "provenance",
        "capture",
        "pending",
        "placement",
        "accumulate",
        "sums",
        "correction_sums",
        "coverage",
    ],
    [
        "diagnosis",
        "measurement",
        "curvature",
        "collection",
        "fisher",
        "steps",
        "checkpoint",
        "spectrum_log",
        "convergence",
        "passes",
        "driving",
        "driver",
        "correction",
        "correcting",
        "selecting",
        "edit_report",
        "edit_plan",
        "editing",
    ],
    [
        "sweeps.rotations",
        "sweeps.frontier",
        "sweeps.trials",
        "sweeps.log",
        "sweeps.sweep",
        "sweeps.layer_search",
        "sweeps",
    ],
    [
        "writing.difference",
        "writing.fingerprint",
        "writing.patch",
        "writing.patched",
        "writing.checkpoint",
        "writing.whole",
        "writing.low_rank",
        "writing.factored",
        "writing.lora",
        "writing.card",
        "writing",
    ],
    ["hf", "evals", "baselines", "report"],
    [
        "analysis.bands",
        "analysis.watching",
        "analysis.texts",
        "analysis.resampling",
        "analysis.ratio",
        "analysis.separation",
        "analysis.correlation",
        "analysis.detector",
        "analysis.heat_map",
        "analysis.ranking",
        "analysis.recitation",
        "analysis.mining",
        "analysis.stress",
        "analysis.examples",
        "analysis.sharpness",
        "analysis.gradients",
        "analysis",
    ],
    [
        "planning.sizes",
        "planning.flops",
        "planning.live",
        "planning.answers",
        "planning.scratch",
        "planning.sharing",
        "planning.rehearsal",
        "planning.estimate",
        "planning.layers",
        "planning.memory",
        "planning.fit",
        "planning.cost",
        "planning.twin",
        "planning.table",
        "planning.plan",
        "planning",
    ],
    ["demo", "lab", "studies", "cli"],
]
# Packages of one floor that know nothing of each other.
STRANGERS = ["hf", "evals", "baselines", "report"]

OWNERS = {
    "triton": ["kernels", "ops.launch"],
    "_C": ["ops._native"],
    "_cuda": ["ops._native_cuda"],
    "torch.library": ["ops._library"],
    "torch.distributed": ["distributed"],
    "transformers": ["hf"],
    "tokenizers": ["hf"],
    "gguf": ["hf"],
    "matplotlib": ["report"],
    "jinja2": ["report"],
    "markupsafe": ["report"],
    "safetensors": ["storage"],
    "rapidfuzz": ["evals.memorization"],
    "lm_eval": ["evals.harness"],
    "tqdm": ["progress"],
    # Taken by its shape, imported by nobody.
    "datasets": [],
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels" / "src").rglob("*.py")]):
        inside = path.is_relative_to(PACKAGE)
        relative = path.relative_to(PACKAGE if inside else ROOT / "kernels" / "src")
        parts = ([] if inside else ["kernels"]) + list(relative.with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield name, ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def typing_only(tree: ast.Module) -> ast.Module:
    """Return the tree without ``if TYPE_CHECKING`` blocks, which import nothing when run."""

    class Strip(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | None:
            guard = node.test
            return None if isinstance(guard, ast.Name) and guard.id == "TYPE_CHECKING" else node

    return Strip().visit(tree)


def place(name: str) -> tuple[int, int] | None:
    """Return floor and seat of a module: the longest entry that is its name or a parent."""
    found = [
        (len(entry), floor, seat)
        for floor, entries in enumerate(FLOORS)
        for seat, entry in enumerate(entries)
        if name == entry or name.startswith(f"{entry}.")
    ]
    return max(found)[1:] if found else None


@pytest.mark.parametrize(
    ("name", "tree"), list(modules()), ids=lambda v: v if type(v) is str else ""
)
def test_imports_go_down_only(name: str, tree: ast.Module) -> None:
    if name in ("", "__main__", "core"):
        return
    here = place(name)
    assert here is not None, f"{name} has no floor: add it to FLOORS"
    # core.factors hands over to core.eigh inside a method: the one look upwards.
    allowed = {("core.factors", "core.eigh")}
    for imported in imports(typing_only(tree)):
        target = imported.removeprefix("curvfast.")
        there = place(target) if imported.startswith("curvfast.") else None
        if there is None or (name, target.rsplit(".decompose")[0]) in allowed:
            continue
        assert there <= here, f"{name} imports {imported}, which is above it"
        package, other = name.split(".")[0], target.split(".")[0]
        if package in STRANGERS and other in STRANGERS:
            assert package == other, f"{name} imports {imported}: two packages of one floor"


@pytest.mark.parametrize(
    ("name", "tree"), list(modules()), ids=lambda v: v if type(v) is str else ""
)
def test_third_parties_have_one_owner(name: str, tree: ast.Module) -> None:
    for imported in imports(tree):
        bare = imported.removeprefix("curvfast.")
        for library, owners in OWNERS.items():
            if bare == library or bare.startswith(f"{library}."):
                assert any(name == o or name.startswith(f"{o}.") for o in owners), (
                    f"{name or 'curvfast'} imports {imported}; its owner is {owners}"
                )


@pytest.mark.parametrize(
    ("name", "tree"), list(modules()), ids=lambda v: v if type(v) is str else ""
)
def test_only_the_command_line_prints_or_configures_logging(name: str, tree: ast.Module) -> None:
    if name.split(".")[0] == "cli":
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("print", "logging.basicConfig"), f"{name} calls {called}"


def test_no_file_is_long() -> None:
    folders = ("curvfast", "kernels", "csrc", "benchmarks", "tests")
    lengths = {
        path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines())
        for folder in folders
        for pattern in ("*.py", "*.cpp", "*.h", "*.cu", "*.cuh")
        for path in (ROOT / folder).rglob(pattern)
        # A test file lists properties; it may be longer than a file that holds one idea.
        if folder != "tests"
    }
    too_long = {str(path): n for path, n in lengths.items() if n > LONGEST}
    assert not too_long
    assert lengths


def test_no_module_shares_a_public_name() -> None:
    """A module curvfast/collect.py would replace curvfast.collect() once it is imported."""
    import curvfast

    files = {path.stem for path in PACKAGE.iterdir()}
    assert not files & set(curvfast._HOMES)


def test_the_global_generator_is_never_drawn_from() -> None:
    """Random functions of torch take a generator of ours, except inside fork_rng."""
    drawing = {"torch.rand", "torch.randn", "torch.randint", "torch.randperm", "torch.multinomial"}
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in drawing:
                given = {keyword.arg for keyword in node.keywords}
                assert "generator" in given, f"{name}: {ast.unparse(node)}"
