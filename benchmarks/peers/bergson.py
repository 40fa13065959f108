"""bergson: ``collect_hessians``, its K-FAC pass over a dataset's own labels, up to its files."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

from bergson.config.config import HessianConfig, IndexConfig
from bergson.hessians.hessian_approximations import collect_hessians
from datasets import Dataset
from torch import nn

from peers import DROPPED, Batch, Fit, Moments

PACKAGE = "bergson"
CONVENTION = "plain sums; counts beside them"
POSITIONS = DROPPED


def prepare(model: nn.Module, batches: Sequence[Batch], layers: Sequence[str]) -> Fit:
    # As its own loading of a model does.
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    rows = [row.tolist() for batch in batches for row in batch["input_ids"]]
    size = len(batches[0]["input_ids"])
    indices = [list(range(start, start + size)) for start in range(0, len(rows), size)]
    data = Dataset.from_dict({"input_ids": rows, "length": [len(row) for row in rows]})
    prefix = f"{model.base_model_prefix}."
    names = {name: name.removeprefix(prefix) for name in layers}

    def run() -> Any:
        index = IndexConfig(run_path=tempfile.mkdtemp(), loss_reduction="sum")
        index.partial_run_path.mkdir(parents=True)
        return collect_hessians(
            model, data, index, batches=indices, target_modules=set(names.values()),
            hessian_cfg=HessianConfig(method="kfac", use_dataset_labels=True),
        )  # fmt: skip

    def sums(found: Any) -> Moments:
        return {n: (found.A_cov_dict[own], found.S_cov_dict[own]) for n, own in names.items()}

    return Fit(run, sums)
