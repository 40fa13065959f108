"""Seeds, quiet libraries, and memory that shows when it is read before it is written."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Read when torch loads OpenMP: threads that spin while they wait take the cores others work on.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from pathlib import Path

import pytest
import torch

from curvfast.kfac import decomposition
from curvfast.ops import devices

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    # Read when a kernel is defined: the kernels of this process are interpreted.
    os.environ["TRITON_INTERPRET"] = "1"
# Two cores: tests are small, and threads that wait for each other cost more than they give. Where
# the tests are divided among processes, each has a core.
_ALONE = "PYTEST_XDIST_WORKER" not in os.environ
torch.set_num_threads(min(2, os.cpu_count() or 1) if _ALONE else 1)

LONGEST = (
    "test_kernels_compile", "test_packaging", "test_sanitizers", "test_distributed", "test_demo",
    "test_plan_collection", "test_second_moment",
)  # fmt: skip
"""Files that begin, the longest first: one that comes last is waited for."""
CORE = {
    "test_architecture", "test_backends", "test_collect", "test_collect_exact", "test_corrections",
    "test_edit", "test_eigenbasis", "test_evals", "test_masks", "test_patch", "test_projection",
    "test_search", "test_second_moment", "test_selection", "test_spectrum", "test_storage",
}  # fmt: skip
"""Files that ``--quick`` runs: from a hook's rows to an edited weight."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="the core of the library alone")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    left_out = config.getoption("quick") and collection_path.stem not in CORE
    return True if left_out and collection_path.suffix == ".py" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1234)


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _instruction_sets() -> list[object]:
    """Those this processor has, plain code among them."""
    from curvfast.ops.native import extension

    missing = extension.unavailable()
    if missing:
        return [pytest.param("portable", marks=pytest.mark.skip(reason=missing))]
    return [name for name, supported in extension.instruction_sets().items() if supported]


@pytest.fixture(params=_instruction_sets())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Multiply second moments on the CPU by each instruction set in turn."""
    monkeypatch.setenv("CURVFAST_ISA", request.param)
    return request.param


# Modules whose tests all run twice: the second time as on an accelerator.
BOTH_WAYS = {
    "test_agreement", "test_collect", "test_collect_exact", "test_corrections", "test_eigenbasis",
    "test_families", "test_marginals", "test_passes",
}  # fmt: skip


# What code asks of a device, and the module that answers.
QUESTIONS = [
    (devices, "on_accelerator"), (devices, "takes_kernels"), (decomposition, "takes_batches"),
]  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marked = metafunc.definition.get_closest_marker("cpu_branches")
    if metafunc.module.__name__.rsplit(".")[-1] in BOTH_WAYS and marked is None:
        metafunc.parametrize("branches", ["cpu", "accelerator"], indirect=True)


@pytest.fixture(autouse=True)
def branches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Answer for CPU tensors what an accelerator would, where a test is parametrised so."""
    chosen = getattr(request, "param", "cpu")
    if chosen == "accelerator":
        for home, question in QUESTIONS:
            monkeypatch.setattr(home, question, lambda device: True)
    return chosen


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill torch.empty with NaN, so that a value read before it is written shows."""
    original = torch.empty

    def empty(*args, **kwargs):
        tensor = original(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for models that tests of one module train, to be read again by the others."""
    return tmp_path_factory.mktemp("cache")
