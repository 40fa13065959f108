"""Export of an edit as a LoRA adapter in PEFT's format: ΔW = α (W' − W), truncated by its SVD.

ΔW is usually of full rank, so an adapter is an approximation; the report states its error.
A folder has ``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT reads them, and the
report in ``curvfast.json``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from curvfast._version import __version__
from curvfast.display import aligned
from curvfast.distributed import is_sharded_model
from curvfast.editing.plan import EditArguments, plan_edit
from curvfast.editing.report import as_json
from curvfast.errors import InputError, StorageError
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.kfac.projection import working_dtype
from curvfast.model.families import LinearLayer
from curvfast.model.identity import is_causal_lm, model_facts
from curvfast.storage import FORMAT_VERSION, write_json, write_tensors

_PREFIX = "base_model.model"


@dataclass(frozen=True)
class LayerAdapter:
    """The approximation of one layer's edit by an adapter."""

    name: str
    rank: int
    energy: float
    """Kept share of ‖ΔW‖², the squared Frobenius norm of the change; 1 if nothing changes."""
    relative_error: float
    """‖ΔW − B A‖ / ‖ΔW‖ in Frobenius norm; 0 if nothing changes."""
    change: float
    """‖ΔW‖ / ‖W‖."""


@dataclass(frozen=True)
class AdapterReport:
    """Report of :func:`export_lora`, layer by layer; prints as a table."""

    layers: tuple[LayerAdapter, ...]
    energy: float
    """Kept share of Σ ‖ΔW‖² over all layers."""
    strength: float = 1.0
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Provenance, JSON-able: model, rule, factors."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        return {
            "energy": self.energy,
            "strength": self.strength,
            "layers": [as_json(layer) for layer in self.layers],
            "provenance": dict(self.provenance),
        }

    def __str__(self) -> str:
        """Return the report as an aligned table."""
        head = ["layer", "rank", "energy %", "error %", "change %"]
        rows = [
            [
                e.name, str(e.rank), f"{100 * e.energy:.2f}", f"{100 * e.relative_error:.2f}",
                f"{100 * e.change:.2f}",
            ]
            for e in self.layers
        ]  # fmt: skip
        return f"{aligned([head, *rows])}\n{self.energy:.2%} of the energy of the whole change"


def export_lora(
    model: nn.Module,
    basis: Eigenbasis,
    directory: str | PathLike[str],
    *,
    rank: int,
    **options: Unpack[EditArguments],
) -> AdapterReport:
    """Write the change of :func:`curvfast.edit` as a LoRA adapter; the model stays unchanged.

    Args:
        model: The model the basis was measured on.
        basis: Eigenbases by layer name.
        directory: Folder of the adapter; created if missing.
        rank: r of the adapter, limited to the width of a narrower layer.
        options: ``mass``, ``layers``, ``fraction``, ``pairs``, ``selection``, ``importance``,
            ``corrections`` and ``strength``, as in :func:`curvfast.edit`.

    Returns:
        The share of the change that the adapter keeps, layer by layer and in all.

    Raises:
        InputError: If the rank is below 1, or a layer is not an ``nn.Linear`` or transformers'
            ``Conv1D``, or sharded; and whatever else :func:`curvfast.edit` raises.
        StorageError: If the folder cannot be written.
    """
    if rank < 1:
        raise InputError(f"rank={rank}: pass the rank of the adapter, such as 64")
    plan = plan_edit(model, basis, **options)
    for step in plan.steps:
        _refuse(step.layer)
    tensors, entries, kept, whole = {}, [], 0.0, 0.0
    for layer, new, _ in plan.evaluated():
        weight = layer.matrix()
        dtype = working_dtype(weight)
        down, up, values = truncated(new.to(dtype) - weight.to(dtype), rank)
        tensors[f"{_PREFIX}.{layer.name}.lora_A.weight"] = down
        tensors[f"{_PREFIX}.{layer.name}.lora_B.weight"] = up
        energies = values.double().square()
        total, lost = float(energies.sum()), float(energies[len(down) :].sum())
        share = lost / total if total else 0.0
        change = math.sqrt(total) / max(float(weight.double().norm()), 1e-300)
        entries.append(LayerAdapter(layer.name, len(down), 1 - share, math.sqrt(share), change))
        kept, whole = kept + total - lost, whole + total
    energy = kept / whole if whole else 1.0
    report = AdapterReport(tuple(entries), energy, plan.strength, plan.provenance)
    layers = [step.layer for step in plan.steps]
    folder = Path(directory)
    head = {"kind": "curvfast-lora", "format_version": FORMAT_VERSION}
    try:
        write_tensors(folder / "adapter_model.safetensors", tensors)
        write_json(folder / "adapter_config.json", adapter_config(model, layers, rank))
        facts = {**head, "curvfast_version": __version__, **report.to_dict()}
        write_json(folder / "curvfast.json", facts)
    except OSError as error:
        raise StorageError(f"could not write an adapter to {str(folder)!r}: {error}") from error
    return report


def truncated(change: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return A and B with B A the best rank-r approximation of ΔW, and all singular values.

    Args:
        change: ΔW, [d_out, d_in], float32 or float64.
        rank: r, cut to the smaller of the two widths.

    Returns:
        A [r, d_in] and B [d_out, r], of equal Frobenius norm; singular values, descending.
    """
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root, s


def adapter_config(model: nn.Module, layers: list[LinearLayer], rank: int) -> dict[str, Any]:
    """Return PEFT's configuration of an adapter of these layers, with scale 1."""
    narrow = {n.name: min(n.d_in, n.d_out) for n in layers if min(n.d_in, n.d_out) < rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if is_causal_lm(model) else None,
        "base_model_name_or_path": model_facts(model)["name"],
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": narrow,
        "alpha_pattern": narrow,
        "target_modules": [layer.name for layer in layers],
        "fan_in_fan_out": any(layer.transposed for layer in layers),
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "modules_to_save": None,
    }


def _refuse(layer: LinearLayer) -> None:
    if type(layer) is not LinearLayer:
        raise InputError(
            f"layer {layer.name!r} is of {type(layer.module).__name__}: adapters of nn.Linear and "
            "transformers' Conv1D can be written; leave it out of layers="
        )
    if is_sharded_model(layer.module):
        raise InputError(f"layer {layer.name!r} is sharded: load the model whole on one process")
