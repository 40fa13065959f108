"""EleutherAI's lm-evaluation-harness, asked of a model in memory, such as an edited one.

The library is an extra of this one: ``pip install 'curvfast[lm-eval]'``.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Real
from os import PathLike
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from curvfast.errors import CurvfastError, InputError
from curvfast.evals.comparison import Score, flat
from curvfast.steps import frozen


@dataclass(frozen=True, eq=False)
class Harness:
    """Tasks of the harness, to be asked of any number of models; made by :func:`find_tasks`."""

    tasks: tuple[str, ...]
    """Names of tasks, groups and tags."""
    manager: Any
    """The harness's ``TaskManager``, which knows them."""
    version: str
    """Of the harness, on which its figures depend."""

    def scores(
        self, model: nn.Module, tokenizer: Any, *, limit: int | None = None, batch_size: int = 8
    ) -> list[Score]:
        """Ask the tasks, as :func:`harness_scores` does.

        Args:
            model: As of :func:`harness_scores`.
            tokenizer: As of :func:`harness_scores`.
            limit: As of :func:`harness_scores`.
            batch_size: As of :func:`harness_scores`.

        Returns:
            A score for each metric of each task, in the harness's order.

        Raises:
            InputError: As of :func:`harness_scores`.
        """
        if batch_size < 1 or (limit is not None and limit < 1):
            raise InputError(f"limit={limit}, batch_size={batch_size}: pass at least 1")
        library = _library()
        try:
            with _as_found(model):
                # The harness may give the tokenizer a padding token.
                asked = library.HFLM(
                    pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size
                )
                found = library.simple_evaluate(
                    model=asked, tasks=list(self.tasks), task_manager=self.manager, limit=limit,
                    log_samples=False,
                )  # fmt: skip
        except (OSError, ValueError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise InputError(
                f"lm-evaluation-harness could not ask {', '.join(self.tasks)}: {reason}. Where it "
                "cannot download the data of a task, pass include= (--lm-eval-include), with a "
                "YAML that names files that are here"
            ) from error
        return scores_of(found["results"])


def harness_scores(
    model: nn.Module,
    tokenizer: Any,
    tasks: str | Sequence[str],
    *,
    include: str | PathLike[str] | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, float]:
    """Ask tasks of lm-evaluation-harness of a model that is in memory, with any edit made to it.

    The harness seeds the global generators, so that two models get the same questions; here their
    states are kept, as is the mode of the model. Tasks take the prompts, few-shot examples and
    metrics of their YAML. Source: https://github.com/EleutherAI/lm-evaluation-harness.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer; not changed.
        tasks: Names of tasks, groups or tags, or globs of them; a string may hold several, with
            commas between.
        include: A folder of YAML files with tasks of your own, which go before the harness's.
        limit: Questions of each task that are asked, from the first on; None asks all.
        batch_size: Requests at a time.

    Returns:
        Values by ``"task.metric"``, or ``"task.metric,filter"`` where the task filters answers, and
        standard errors by the same with ``_stderr`` at the end.

    Raises:
        InputError: If a task is unknown, or its data cannot be had, or an argument is out of range.
        CurvfastError: If the library is not installed.
    """
    found = find_tasks(tasks, include=include)
    return dict(flat(found.scores(model, tokenizer, limit=limit, batch_size=batch_size)))


def find_tasks(
    tasks: str | Sequence[str], *, include: str | PathLike[str] | None = None
) -> Harness:
    """Look tasks up by name; neither their data nor a model is loaded.

    Args:
        tasks: As of :func:`harness_scores`.
        include: As of :func:`harness_scores`.

    Returns:
        The tasks.

    Raises:
        InputError: If one is unknown, or ``include`` is no folder.
        CurvfastError: If the library is not installed.
    """
    asked = tasks.split(",") if isinstance(tasks, str) else tasks
    names = [name.strip() for name in asked if name.strip()]
    if not names:
        raise InputError("no task was named; pass names as lm-evaluation-harness knows them")
    if include is not None and not Path(include).is_dir():
        raise InputError(f"there is no folder {str(include)!r} of tasks; pass one of YAML files")
    library = _library()
    manager = library.TaskManager(include_path=None if include is None else str(include))
    found: list[str] = []
    for name in names:
        matching = manager.match_tasks([name])
        if not matching:
            raise _unknown(name, manager.all_tasks)
        found += matching
    return Harness(tuple(dict.fromkeys(found)), manager, library.__version__)


def scores_of(results: Mapping[str, Mapping[str, Any]]) -> list[Score]:
    """Read what the harness calls ``results``: by task, values by ``"metric,filter"``.

    Args:
        results: Of the harness; what is no number of a metric, such as a name, is passed over.
    """
    found = []
    for task, entries in results.items():
        for key, value in entries.items():
            metric, comma, rule = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            error = entries.get(f"{metric}_stderr,{rule}")
            found.append(
                Score(
                    task,
                    metric if rule == "none" else f"{metric},{rule}",
                    float(value),
                    float(error) if isinstance(error, Real) else None,
                )
            )
    return found


def _library() -> SimpleNamespace:
    """Return what is used of the library, which takes seconds to import."""
    try:
        from lm_eval import __version__, simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise CurvfastError(
            f"tasks are asked by lm-evaluation-harness, which cannot be imported ({error}): "
            "pip install 'curvfast[lm-eval]'"
        ) from error
    return SimpleNamespace(
        __version__=__version__, simple_evaluate=simple_evaluate, HFLM=HFLM, TaskManager=TaskManager
    )


@contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """Bring back the global generators and the model's modes."""
    python, legacy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count())
    try:
        with torch.random.fork_rng(devices), frozen(model, keep_mode=False):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)


def _unknown(name: str, known: Sequence[str]) -> InputError:
    close = get_close_matches(name, known, 3)
    return InputError(
        f"lm-evaluation-harness knows no task {name!r}"
        + (f"; it knows {', '.join(close)}" if close else "")
        + ". Its list: lm_eval ls tasks; for one of your own pass include= (--lm-eval-include), "
        "the folder of its YAML"
    )
