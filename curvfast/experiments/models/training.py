"""The one training loop of the demo and the lab: AdamW, a short warm-up, a cosine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from curvfast.display import Bar, ReportStage, silent, tenth_ends
from curvfast.experiments.models import training_state

After = Callable[[Any, int], None]
"""(model, steps taken): what is done between steps; it changes nothing."""
_WARM_UP = 0.05


def fit(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.95),
    after: After | None = None,
    unfinished: Path | None = None,
    report_stage: ReportStage = silent,
) -> Any:
    """Train a model of transformers in place on one batch a step.

    Cut off and called again with the same arguments it goes on, at most a tenth of the steps
    earlier, to the same bits.

    Args:
        model: Returns an output with ``loss``; draws no random numbers while it trains.
        batches: Keyword arguments of the model, at least ``steps`` of them, from the first.
        steps: Optimizer steps, which the schedule ends with.
        learning_rate: At the end of the warm-up.
        weight_decay: Of AdamW, on every parameter.
        betas: Of AdamW.
        after: Called before the first step and after each; of a training that goes on, after the
            steps that were left.
        unfinished: Folder of the state to go on from, written at each tenth; None keeps none.
        report_stage: Told a line at each tenth where no bar is shown.

    Returns:
        The model, in eval mode.

    Raises:
        StorageError: If the state cannot be written.
    """
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay
    )
    begun = 0 if unfinished is None else training_state.restore(unfinished, model, optimizer)
    if begun:
        report_stage(f"going on after step {begun} of {steps}, where an earlier run was cut off")
    elif after is not None:
        after(model, 0)
    left = zip(range(begun + 1, steps + 1), islice(batches, begun, None), strict=False)
    with Bar("train", steps, "step", done=begun, report_stage=report_stage) as bar:
        for taken, batch in left:
            optimizer.param_groups[0]["lr"] = learning_rate * _rate(taken - 1, steps)
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if after is not None:
                after(model, taken)
            if unfinished is not None and taken < steps and tenth_ends(taken, steps):
                training_state.keep(unfinished, model, optimizer, taken)
            bar.advance(1, loss=f"{loss.item():.3f}")
    return model.eval()


def _rate(step: int, steps: int) -> float:
    warm_up = max(1, int(_WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
