"""Small folders of results for the tests of reports, each as its writer leaves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import curvfast
from curvfast.editing.report import EditReport, LayerEdit
from curvfast.export.patch import make_patch
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.kfac.factors import Factors
from curvfast.kfac.layer_factors import LayerFactors
from curvfast.report.curvature import save_curvature
from curvfast.report.recitals import Continuation, save_passages

VERSIONS = {"curvfast": "0.1.0", "python": "3.11.7", "torch": "2.13.0"}
EVIL = "</script><img src=x onerror=alert(1)>&\"'{{ 7 * 7 }}"
RECITED = {"strict": 1.0, "loose": 1.0, "levenshtein": 0.0, "perplexity": 65.2}
FORGOTTEN = {"strict": 0.016, "loose": 0.031, "levenshtein": 0.764, "perplexity": 70.3}
SHARES = {"memorized": 0.8, "ground_truth": 0.1, "validation": 0.67, "clean": 0.9}


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def factors(names: tuple[str, ...] = ("mlp.up_proj", "mlp.down_proj"), d: int = 6) -> Factors:
    """Factors of known spectra: A has eigenvalues 2^-j, G 3^-i; d_out is d, d_in d + 2."""
    a = torch.diag(2.0 ** -torch.arange(d + 2.0))
    g = torch.diag(3.0 ** -torch.arange(float(d)))
    layers = {name: LayerFactors(10 * a, 10 * g, 10, 10) for name in names}
    return Factors(layers, provenance(names))


def provenance(names: tuple[str, ...]) -> dict[str, Any]:
    return {
        "model": {"class": "Llama", "name": "/somewhere/tiny", "parameters": 1234567,
                  "dtype": "bfloat16", "versions": VERSIONS},
        "collect": {"layers": "mlp", "skip_last": True},
        "labels": "sampled", "seed": 11, "tokens": 4321, "batches": 3, "ranks": 1,
        "coverage": {"covered": {f"{name}.weight": 4321 for name in names},
                     "uncovered": {"norm.weight": "normalisation: not a linear map"},
                     "fraction": 0.5, "sum_bytes": 9},
        "unrouted": [],
    }  # fmt: skip


def edit_report(name: str = "mlp.up_proj") -> EditReport:
    layer = LayerEdit(name, 25225, 0.5132, 0.9501, 0.4727, 0.7814, 0.002)
    about = {"rule": {"mass": 0.95}, "factors": provenance((name,))}
    return EditReport((layer,), 49152, 1.0, about)


def demo(folder: Path, layer: str = "mlp.up_proj", **more: Any) -> Path:
    """What ``curvfast demo --out`` leaves, but for the checkpoint and the picture."""
    points = [
        {"mass": mass, **{m: {**FORGOTTEN, "kept_fraction": 0.3} for m in ("kfac", "svd")}}
        for mass in (0.8, 0.95)
    ]
    results = {
        "base": {**RECITED, "kept_fraction": 1.0}, "kfac": points[1]["kfac"],
        "svd": points[1]["svd"], "mass": 0.95, "sweep": points,
        "recipe": {"seed": 4, "passages": 64, "length": 128}, "statistics_rows": 10,
        "versions": VERSIONS, "edit": edit_report(layer).to_dict(), "seconds": 142.0,
        "command": "curvfast demo --seed 4", **more,
    }  # fmt: skip
    write(folder / "results.json", results)
    basis = factors((layer,)).eigh()
    save_curvature(folder / "curvature.json", basis, basis.keep(mass=0.95))
    passages = [
        Continuation(
            "In the beginning God", "created the heaven", "created the heaven", "was a sin"
        )
    ]
    save_passages(folder / "passages.json", passages, chosen="1 of 64.")
    return folder


def lab_lm(folder: Path) -> Path:
    figures = {"memorization": 0.9, "perplexity": 20.0, "sums.generated": 0.7, "sums.chosen": 0.8,
               "kept_fraction": 1.0}  # fmt: skip
    ways = {how: {"memorization": 0.1, "arithmetic": 0.6} for how in ("generated", "chosen")}
    sweep = [{"mass": 0.9, "kfac": figures, "svd": figures}]
    results = {
        "schema_version": 1, "tasks": {"sums": "arithmetic"}, "base": figures, "kfac": figures,
        "svd": figures, "mass": 0.9, "kept": {"kfac": ways, "svd": ways}, "sweep": sweep,
        "recipe": {"text": {"seed": 2}, "people": 8}, "versions": VERSIONS,
        "command": "curvfast lab lm --seed 2 --quick",
    }  # fmt: skip
    write(folder / "results.json", results)
    return folder


def lab_vit(folder: Path) -> Path:
    figures = {**SHARES, "kept_fraction": 0.25}
    point = {"mass": 0.9, **{m: figures for m in ("kfac", "svd", "random")}}
    statistics = {"images": "fresh", "tokens": "cls", "labels": "sampled"}
    results = {
        "schema_version": 1, "base": {**SHARES, "kept_fraction": 1.0}, **point, "sweep": [point],
        "statistics": [{"statistics": statistics, "matched": figures, "sweep": [point]}],
        "blocks": [{"blocks": [0, 3], "sweep": [point]}], "versions": VERSIONS,
        "recipe": {"data": "mnist", "train_images": 200, "noise": 0.2, "seed": 1},
    }  # fmt: skip
    write(folder / "results.json", results)
    return folder


def study(folder: Path, seeds: tuple[int, ...] = (0, 2), **more: Any) -> Path:
    for seed in seeds:
        content = {
            "schema_version": 1, "study": "figure3", "seed": seed, "quick": False,
            "figures": {"share": 0.5 + seed / 10}, "seconds": 12.0, "cpu_seconds": 10.0,
            "versions": VERSIONS, **more,
        }  # fmt: skip
        write(folder / f"seed-{seed}.json", content)
    return folder


def saved(folder: Path) -> Eigenbasis:
    """Factors, basis, selection, edit and patch of one model, as the library saves them."""
    model = torch.nn.ModuleDict({"up": torch.nn.Linear(8, 6), "down": torch.nn.Linear(8, 6)})
    measured = factors(("up", "down"))
    basis = measured.eigh()
    measured.save_pretrained(folder / "factors")
    basis.save_pretrained(folder / "basis")
    basis.keep(mass=0.7).save_pretrained(folder / "selection")
    make_patch(model, basis, mass=0.8).save(folder / "patch")
    write(folder / "edit.json", curvfast.edit(model, basis, mass=0.8).to_dict())
    return basis
