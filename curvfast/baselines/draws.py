"""Loss terms of each step of a supervised baseline: batches of both sets in a seeded order."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from curvfast.baselines.examples import drawn
from curvfast.baselines.rival import ForgetTask
from curvfast.baselines.trial import Objective, Term, mean_loss


def generators(seed: int) -> tuple[torch.Generator, torch.Generator, torch.Generator]:
    """Return independent generators for initial values, memorized rows and clean rows."""
    parent = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**62, (3,), generator=parent).tolist()
    first, second, third = (torch.Generator().manual_seed(own) for own in seeds)
    return first, second, third


def balanced_steps(
    task: ForgetTask,
    size: int,
    seed: int,
    *,
    forget: float,
    keep: float,
    objective: Objective = mean_loss,
) -> Iterator[list[Term]]:
    """Yield steps without end: ``forget`` · objective(memorized) + ``keep`` · mean loss(clean).

    Each step has rows of both sets, so neither mean is empty; the smaller set is repeated more
    often.

    Args:
        task: The examples to draw from.
        size: Rows of each set in a step, at most.
        seed: Seed of the order.
        forget: Coefficient of the memorized rows' objective.
        keep: Coefficient of the clean rows' loss, where there are any.
        objective: Objective of the memorized rows, by default the per-sample mean cross-entropy.
    """
    _, order, clean_order = generators(seed)
    clean = drawn(task.clean, size, clean_order) if task.clean else None
    for batch in drawn(task.memorized, size, order):
        terms = [Term(batch, forget, objective)]
        if clean is not None:
            terms.append(Term(next(clean), keep, mean_loss))
        yield terms
