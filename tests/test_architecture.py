"""Import rules: lower layers only, no cycles, and one owner of each third-party library."""

from __future__ import annotations

from graphlib import TopologicalSorter

import pytest
from modules import imports, modules

# Low to high. Packages of one line do not import each other.
FLOORS = [
    "errors display _version kernels _C _cuda",
    "ops storage data distributed",
    "model",
    "kfac evals",
    "collection editing",
    "export baselines sweeps analysis",
    "report hf",
    "planning",
    "experiments.recipes",
    "experiments.data",
    "experiments.models",
    "experiments.runs",
    "experiments.studies",
    "cli",
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
OWNERS = {
    "triton": ["kernels", "ops.launch"], "torch.library": ["ops._library"],
    "_C": ["ops.native.extension"], "_cuda": ["ops.native.extension_cuda"],
    "torch.distributed": ["distributed"], "transformers": ["hf"], "tokenizers": ["hf"],
    "gguf": ["hf"], "matplotlib": ["report", "experiments.studies"], "jinja2": ["report"],
    "markupsafe": ["report"], "safetensors": ["storage"], "rapidfuzz": ["evals.memorization"],
    "lm_eval": ["evals.lm_eval"], "tqdm": ["display"], "datasets": [],
}  # fmt: skip
MODULES = modules()
PACKAGES = {"", "__main__", "experiments"}  # they hand names on


def room_of(name: str) -> str:
    return ".".join(name.split(".")[: 2 if name.startswith("experiments.") else 1])


@pytest.mark.parametrize("name", sorted(MODULES.keys() - PACKAGES))
def test_imports_go_down_and_third_parties_have_one_owner(name: str) -> None:
    for imported in imports(MODULES[name]):
        target = imported.removeprefix("curvfast.")
        for library in (library for library in OWNERS if f"{target}.".startswith(f"{library}.")):
            assert any(f"{name}.".startswith(f"{owner}.") for owner in OWNERS[library]), imported
        here, there = room_of(name), room_of(target)
        assert target == imported or there == here or FLOOR[there] < FLOOR[here], imported


def test_no_file_is_in_a_circle() -> None:
    kept = MODULES.keys() - {""}
    below = {name: set() for name in kept}
    for name in kept:
        for target in (i.removeprefix("curvfast.") for i in imports(MODULES[name])):
            below[name] |= {target if target in kept else target.rpartition(".")[0]} & kept - {name}
    list(TopologicalSorter(below).static_order())
