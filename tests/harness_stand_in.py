"""A stand-in for lm-evaluation-harness: the signatures of its 0.4.13, and its side effects."""

from __future__ import annotations

import fnmatch
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

TASKS = ["arc_easy", "gsm8k", "hellaswag", "mmlu_anatomy", "mmlu_virology"]
calls: list[dict[str, Any]] = []


class HFLM:
    def __init__(
        self, pretrained, backend="default", revision="main", subfolder="", tokenizer=None,
        truncation=False, logits_cache=True, max_length=None, device="cuda", dtype="auto",
        softmax_dtype=None, mixed_precision_dtype=None, batch_size=1, max_batch_size=64,
        trust_remote_code=False, use_fast_tokenizer=True, add_bos_token=None, prefix_token_id=None,
        parallelize=False, max_memory_per_gpu=None, max_cpu_memory=None,
        offload_folder="./offload", tp_plan=None, peft=None, delta=None, autogptq=False,
        gptqmodel=False, gguf_file=None, think_end_token=None, enable_thinking=None,
        chat_template_args=None, **kwargs,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.batch_size = pretrained, tokenizer, batch_size
        self.model.eval()
        self.tokenizer.pad_token = "<|pad|>"


class TaskManager:
    def __init__(
        self, verbosity=None, include_path=None, include_defaults=True, metadata=None
    ) -> None:
        own = [path.stem for path in Path(include_path).glob("*.yaml")] if include_path else []
        self.all_tasks = sorted([*TASKS, *own])

    def match_tasks(self, task_list):
        return sorted({n for pattern in task_list for n in fnmatch.filter(self.all_tasks, pattern)})


def simple_evaluate(
    model, model_args=None, tasks=None, num_fewshot=None, batch_size=None, max_batch_size=None,
    device=None, use_cache=None, cache_requests=False, rewrite_requests_cache=False,
    delete_requests_cache=False, limit=None, samples=None, bootstrap_iters=100000,
    check_integrity=False, write_out=False, log_samples=True, evaluation_tracker=None,
    system_instruction=None, apply_chat_template=False, fewshot_as_multiturn=True, gen_kwargs=None,
    task_manager=None, verbosity=None, predict_only=False, random_seed=0, numpy_random_seed=1234,
    torch_random_seed=1234, fewshot_random_seed=1234, confirm_run_unsafe_code=False, metadata=None,
):  # fmt: skip
    assert isinstance(model, HFLM)
    assert set(tasks) <= set(task_manager.all_tasks)
    if "hellaswag" in tasks:
        raise ConnectionError("Couldn't reach 'hellaswag' on the Hub\nand more")
    random.seed(random_seed)
    np.random.seed(numpy_random_seed)
    torch.manual_seed(torch_random_seed)
    random.random(), np.random.rand(), torch.rand(1)
    calls.append({"model": model.model, "batch": model.batch_size, "tasks": tasks, "limit": limit})
    calls[-1]["training"] = model.model.training
    figure = level(model.model)
    entries = {
        "name": "task", "alias": " - task", "sample_len": limit or 1000, "acc,none": figure,
        "acc_stderr,none": np.float64(0.25), "exact_match,strict-match": np.float32(0.0),
        "exact_match_stderr,strict-match": "N/A",
    }  # fmt: skip
    return {"results": {task: dict(entries) for task in tasks}, "n-shot": {}, "date": 0.0}


def level(model: torch.nn.Module) -> float:
    """Return a figure that moves with every weight."""
    return sum(float(p.detach().double().abs().sum()) for p in model.parameters())


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    calls.clear()
    contents = {
        "lm_eval": {"__version__": "0.4.13", "simple_evaluate": simple_evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": HFLM},
        "lm_eval.tasks": {"TaskManager": TaskManager},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
