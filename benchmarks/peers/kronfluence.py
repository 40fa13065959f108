"""kronfluence: ``Analyzer.fit_covariance_matrices``."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from typing import Any

from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments
from kronfluence.task import Task
from torch import Tensor, nn

from peers import WITHOUT_LAST, Batch, Fit, Moments, summed_loss, without_last

PACKAGE = "kronfluence"
CONVENTION = "plain sums; counts beside them"
POSITIONS = WITHOUT_LAST


def prepare(model: nn.Module, batches: Sequence[Batch], layers: Sequence[str]) -> Fit:
    return _fit(model, batches, layers, sampled=False)


def prepare_sampled(model: nn.Module, batches: Sequence[Batch], layers: Sequence[str]) -> Fit:
    return _fit(model, batches, layers, sampled=True)


def _fit(
    model: nn.Module, batches: Sequence[Batch], layers: Sequence[str], *, sampled: bool
) -> Fit:
    class Language(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Tensor:
            logits = model(input_ids=batch["tokens"], use_cache=False).logits
            labels = drawn(logits) if sample else batch["labels"]
            return summed_loss(logits, labels)

        def compute_measurement(self, batch: Any, model: Any) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return list(layers)

    def drawn(logits: Tensor) -> Tensor:
        # As in kronfluence's own examples of language models.
        probabilities = logits.detach().flatten(0, 1).softmax(-1)
        return probabilities.multinomial(1).flatten()

    task = Language()
    analyzer = Analyzer(
        "fit", prepare_model(model, task), task, cpu=True, disable_tqdm=True,
        disable_model_save=True, output_dir=tempfile.mkdtemp(), log_main_process_only=True,
    )  # fmt: skip
    pairs = [without_last(batch) for batch in batches]
    rows = [
        {"tokens": tokens[i], "labels": labels[i]}
        for tokens, labels in pairs
        for i in range(len(tokens))
    ]

    def run() -> None:
        with contextlib.redirect_stdout(None):
            analyzer.fit_covariance_matrices(
                "fit", rows, per_device_batch_size=len(pairs[0][0]), overwrite_output_dir=True,
                factor_args=FactorArguments(use_empirical_fisher=not sampled),
            )  # fmt: skip

    def sums(_: None) -> Moments:
        found = analyzer.load_covariance_matrices("fit")
        return {
            name: (found["activation_covariance"][name], found["gradient_covariance"][name])
            for name in layers
        }

    return Fit(run, sums)
