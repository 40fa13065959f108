"""The one training loop of the demo and the lab: AdamW, a short warm-up, a cosine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from curvfast.progress import Bar

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
) -> Any:
    """Train a model of transformers in place on one batch a step.

    Args:
        model: Returns an output with ``loss``.
        batches: Keyword arguments of the model, at least ``steps`` of them.
        steps: Optimizer steps, which the schedule ends with.
        learning_rate: At the end of the warm-up.
        weight_decay: Of AdamW, on every parameter.
        betas: Of AdamW.
        after: Called before the first step and after each.

    Returns:
        The model, in eval mode.
    """
    model.train()
    if after is not None:
        after(model, 0)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    with Bar("train", steps, "step") as bar:
        for taken, batch in zip(range(1, steps + 1), batches, strict=False):
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if after is not None:
                after(model, taken)
            bar.advance(1, loss=f"{loss.item():.3f}")
    return model.eval()


def _rate(step: int, steps: int) -> float:
    warm_up = max(1, int(_WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
