"""Adapter of EleutherAI's lm-evaluation-harness for models in memory, such as edited ones.

The library is an optional dependency: ``pip install 'curvfast[lm-eval]'``.
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
from curvfast.model.forward import frozen


@dataclass(frozen=True, eq=False)
class Harness:
    """A set of tasks of the harness, to evaluate models on; made by :func:`find_tasks`."""

    tasks: tuple[str, ...]
    """Names of tasks, groups and tags."""
    manager: Any
    """The harness's ``TaskManager``, which resolves them."""
    version: str
    """Version of the harness, on which its figures depend."""

    def scores(
        self, model: nn.Module, tokenizer: Any, *, limit: int | None = None, batch_size: int = 8
    ) -> list[Score]:
        """Evaluate a model on the tasks, with the arguments of :func:`harness_scores`.

        Returns:
            A score for each metric of each task, in the harness's order.

        Raises:
            InputError: If the data of a task cannot be had, or an argument is out of range.
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
    """Evaluate a model in memory, edited or not, on tasks of lm-evaluation-harness.

    The harness seeds the global generators, so that two models get the same questions; their states
    are restored after, as is the mode of the model. Tasks take the prompts, few-shot examples and
    metrics of their YAML. Source: https://github.com/EleutherAI/lm-evaluation-harness.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer; not changed.
        tasks: Names of tasks, groups or tags, or globs of them; a string may hold several, with
            commas between.
        include: A folder of YAML files with further tasks, which take precedence over the
            harness's.
        limit: Number of questions of each task, from the first on; None takes all.
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
    """Look up tasks by name, as :func:`harness_scores` takes them; no data or model is loaded.

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
    """Read the harness's ``results``: by task, values by ``"metric,filter"``.

    Args:
        results: The harness's results; entries that are no number of a metric are skipped.
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
    """Import the library's functions used here, which takes seconds."""
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
    """Restore the global generators and the model's modes after the block."""
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
