"""Factors, bases, selections, edits and patches that a user saved, together as one part."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from curvfast import storage
from curvfast.core.eigenbasis import KIND as BASIS
from curvfast.core.eigenbasis import Eigenbasis
from curvfast.core.factors import Factors
from curvfast.core.selection import Selection
from curvfast.core.spectrum import layer_eigenvalues
from curvfast.core.staircase import Staircase, staircase_by_mass
from curvfast.edit_report import EditReport
from curvfast.report.page.collected import MEASURED, collected, uncovered, versions
from curvfast.report.page.curvature import layer_curvature, outline
from curvfast.report.page.document import Block, Code, Part, Table, Text, sections
from curvfast.report.page.numbers import count, percent
from curvfast.report.page.shown import edit_table, spectra, staircases
from curvfast.writing.patch import KIND as PATCH

FACTORS, SELECTION = "curvfast-factors", "curvfast-selection"
KINDS = (BASIS, FACTORS, SELECTION, PATCH)
"""In the order they are read: factors are decomposed where no basis knows their eigenvalues."""
_MASS = 0.9


@dataclass
class Saved:
    """What lies side by side in one folder, read as far as a page needs it."""

    spectra: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """(λ, μ) by layer name."""
    provenance: dict[str, Any] = field(default_factory=dict)
    selection: Selection | None = None
    edits: dict[str, EditReport] = field(default_factory=dict)
    patches: list[tuple[str, ...]] = field(default_factory=list)
    """Name, layers, bytes, first digits of the hash of the factors."""
    found: list[tuple[str, str]] = field(default_factory=list)
    """Kind and name, as they were read."""

    def add(self, kind: str, path: Path) -> None:
        """Read one folder that the library saved.

        Args:
            kind: One of :data:`KINDS`, in their order.
            path: The folder.

        Raises:
            StorageError: If it is damaged, or of a newer format.
            NonFiniteError: If a factor holds NaN or infinity.
            DecompositionError: If a factor cannot be decomposed.
        """
        if kind == BASIS:
            basis = Eigenbasis.from_pretrained(path, lazy=True)
            self.spectra |= basis.spectra() if basis.frame == "curvature" else {}
            self.provenance |= basis.provenance
        elif kind == FACTORS:
            factors = Factors.from_pretrained(path)
            known: dict[int, Tensor] = {}
            unknown = {name: layer for name, layer in factors.items() if name not in self.spectra}
            for name, layer in unknown.items():
                self.spectra[name] = layer_eigenvalues(name, layer, known)
            self.provenance |= factors.provenance
        elif kind == SELECTION:
            self.selection = Selection.from_pretrained(path)
        else:
            self._add_patch(path)
        self.found.append((kind, path.name))

    def add_edit(self, name: str, report: EditReport) -> None:
        """Add the report of an edit."""
        self.edits[name] = report
        self.found.append(("edit", name))

    def part(self, source: str) -> Part:
        """Return all of it as a part of a page."""
        layers = {name: layer_curvature(g, a) for name, (g, a) in self.spectra.items()}
        edits: list[Block] = []
        for name, report in self.edits.items():
            edits += [Text(f"{name}:"), *edit_table(report)]
        heads = ("patch", "weights", "bytes", "of the factors")
        patches = [Table("Patches", heads, tuple(self.patches))] if self.patches else []
        facts = self.provenance or next(
            (dict(report.provenance.get("factors", {})) for report in self.edits.values()), {}
        )
        return Part(
            "Curvature and edits, as saved",
            source,
            sections(
                (MEASURED, [collected(facts), uncovered(facts)]),
                ("Spectra", spectra(layers)),
                ("Staircases", self._kept()),
                ("Edits", [*edits, *patches]),
                ("Where it comes from", [versions(facts)]),
                ("To make it again", self._code(facts)),
            ),
        )

    def _add_patch(self, path: Path) -> None:
        meta, _ = storage.open_folder(path, kind=PATCH)
        self.edits[path.name] = EditReport.from_dict(meta["edit"])
        size = sum(record.stat().st_size for record in path.glob("tensors-*.safetensors"))
        factors = sorted({str(layer["factors"])[:12] for layer in meta["layers"].values()})
        facts = (path.name, count(len(meta["layers"])), count(size), " ".join(factors))
        self.patches.append(facts)

    def _kept(self) -> list[Block]:
        """Return the selection's staircases; without one, those of an edit's ρ or of 0.9."""
        if self.selection is not None:
            stairs = {n: outline(k) for n, k in self.selection.items() if isinstance(k, Staircase)}
            masks = [
                (name, count(kept.pairs), percent(kept.fraction), percent(kept.mass))
                for name, kept in self.selection.items()
                if name not in stairs
            ]
            how = Text(f"As selected, ranked by {self.selection.importance}.")
            heads = ("layer", "pairs kept", "of all pairs", "of the score")
            table = [Table("Kept pairs that form no staircase", heads, tuple(masks))]
            return [how, *staircases(stairs), *(table if masks else [])]
        rules = [report.provenance.get("rule", {}) for report in self.edits.values()]
        asked = [r["mass"] for r in rules if "mass" in r and r.get("importance", "kfac") == "kfac"]
        mass = asked[0] if asked else _MASS
        stairs = {
            name: outline(staircase_by_mass(g, a, mass))
            for name, (g, a) in self.spectra.items()
            if float(g.sum() * a.sum()) > 0
        }
        how = Text(
            f"What the edit at ρ = {mass:g} keeps."
            if asked
            else f"No selection is here: what an edit at ρ = {mass:g} would keep."
        )
        return [how, *staircases(stairs)] if stairs else []

    def _code(self, facts: dict[str, Any]) -> list[Block]:
        """Return the calls that measure and edit so, as far as what was saved tells."""
        names = {kind: name for kind, name in reversed(self.found)}
        lines = ["import curvfast", ""]
        if FACTORS in names:
            lines.append(f"factors = curvfast.Factors.from_pretrained({_quoted(names[FACTORS])})")
        if BASIS in names:
            lines.append(f"basis = curvfast.Eigenbasis.from_pretrained({_quoted(names[BASIS])})")
        elif FACTORS in names:
            lines.append("basis = factors.eigh()")
        rules = [report.provenance.get("rule", {}) for report in self.edits.values()]
        rule: dict[str, Any] = rules[0] if rules else {}
        if rule and "given" not in rule.values() and len(lines) > 2:
            asked = ", ".join(f"{key}={value!r}" for key, value in rule.items())
            lines.append(f"curvfast.edit(model, basis, {asked})")
        return [Code("\n".join(lines))] if len(lines) > 2 else []


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)
