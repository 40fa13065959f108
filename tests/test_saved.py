"""What earlier versions wrote is read, to the same numbers; what they exported is there."""

from __future__ import annotations

import importlib
import json
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from saved_model import saved_model

import curvfast
from curvfast import Eigenbasis, Factors, Patch, Selection
from curvfast._moved import MOVED

SAVED = Path(__file__).parent / "saved"
FIGURES = json.loads((SAVED / "figures.json").read_text(encoding="utf-8"))


def listed(values) -> dict[str, list]:
    return {name: value.tolist() for name, value in values}


def test_saved_factors_load_to_the_same_numbers() -> None:
    factors = Factors.from_pretrained(SAVED / "factors")
    assert listed((n, f.A) for n, f in factors.items()) == FIGURES["A"]
    assert listed((n, f.G) for n, f in factors.items()) == FIGURES["G"]


def test_a_saved_basis_loads_to_the_same_numbers() -> None:
    basis = Eigenbasis.from_pretrained(SAVED / "basis")
    assert listed((n, b.values_a) for n, b in basis.items()) == FIGURES["values_a"]
    assert listed((n, b.values_g) for n, b in basis.items()) == FIGURES["values_g"]
    for layer in basis.values():
        product = layer.vectors_a.T @ layer.vectors_a
        assert torch.allclose(product, torch.eye(len(product)), rtol=0, atol=1e-6)


def test_a_saved_selection_is_what_its_basis_gives() -> None:
    selection = Selection.from_pretrained(SAVED / "selection")
    assert listed((n, s.widths) for n, s in selection.items()) == FIGURES["widths"]
    basis = Eigenbasis.from_pretrained(SAVED / "basis")
    again = curvfast.select(saved_model(), basis, mass=0.7)
    assert listed((n, s.widths) for n, s in again.items()) == FIGURES["widths"]


def test_a_saved_patch_leads_to_the_same_bits_and_back() -> None:
    model, patch = saved_model(), Patch.load(SAVED / "patch")
    patch.apply(model)
    assert listed(model.named_parameters()) == FIGURES["edited"]
    patch.revert(model)
    assert listed(model.named_parameters()) == listed(saved_model().named_parameters())


def test_public_names_are_all_there() -> None:
    names = json.loads((SAVED / "public_names.json").read_text(encoding="utf-8"))
    assert set(names) <= set(curvfast._HOMES)
    for name in names:
        assert getattr(curvfast, name).__name__ == name


@pytest.mark.parametrize(("name", "home"), json.loads((SAVED / "homes.json").read_text()).items())
def test_public_names_are_importable_from_where_they_were(name: str, home: str) -> None:
    moved = home in MOVED
    if moved:
        sys.modules.pop(f"curvfast.{home}", None)
    with pytest.warns(DeprecationWarning, match="is now") if moved else nullcontext():
        module = importlib.import_module(f"curvfast.{home}")
    assert getattr(module, name) is getattr(curvfast, name)


def test_the_changelog_names_every_path_that_is_forwarded() -> None:
    changelog = (Path(__file__).parents[1] / "CHANGELOG.md").read_text(encoding="utf-8")
    rows = re.findall(r"^  \| `([\w.]+)` \| (`.*`) \|$", changelog, flags=re.M)
    assert {old: re.findall(r"`([\w.]+)`", new) for old, new in rows} == MOVED


def test_modules_the_changelog_names_are_importable() -> None:
    from curvfast.analysis import example_losses, mine, stress
    from curvfast.core.power_law import power_law
    from curvfast.evals import harness_scores

    found = (example_losses, mine, stress, power_law, harness_scores)
    assert all(callable(each) for each in found)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("curvfast.core.nothing")
