"""Rows that a batch counts for chosen layers of a model, found as a measurement finds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.model.batch import Batch
from curvfast.model.counted import CallRows
from curvfast.model.layer import LinearLayer
from curvfast.model.token_streams import TokenStreams


@dataclass
class Seen:
    """Calls of layers in one batch: the rows that count, and leading shapes."""

    calls: dict[str, list[tuple[CallRows, torch.Size]]] = field(default_factory=dict)

    def kept(self, name: str, call: int = 0) -> Tensor:
        """Return which rows of a call count, bool of its leading shape."""
        rows, shape = self.calls[name][call]
        cpu = torch.device("cpu")
        keep = torch.zeros(shape.numel(), dtype=torch.bool)
        keep[rows.rows(name, shape, cpu).indices(cpu)] = True
        left = rows.left_out(name, shape, cpu)
        others = torch.zeros_like(keep)
        if left is not None:
            others[left.indices(cpu)] = True
        assert torch.equal(others, ~keep)
        return keep.view(shape)


def seen_rows(
    model: nn.Module,
    names: list[str],
    run: Callable[[], Any],
    *,
    skip_last: bool = False,
    streams: TokenStreams | None = None,
    **told: Any,
) -> Seen:
    """Return the rows of each call of layers, asked in the backward of what ``run`` returns."""
    modules = dict(model.named_modules())
    layers = [LinearLayer(n, modules[n], *modules[n].weight.shape[::-1]) for n in names]
    streams = streams or TokenStreams(model, layers)
    batch, seen = Batch(skip_last=skip_last, **told), Seen()

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, y: Tensor) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            frame = streams.current()
            batch.remember(name, frame)
            if not y.requires_grad:
                return
            rows = batch.call_rows(name, x, frame)
            shape = x.shape[:-1]
            # As many recomputed calls are never followed by a gradient, so they show no rows.
            y.register_hook(lambda g: seen.calls.setdefault(name, []).append((rows, shape)))

        return hook

    streams.attach()
    handles = [modules[n].register_forward_hook(after(n), with_kwargs=True) for n in names]
    try:
        output = run()
        for value in output.values() if isinstance(output, Mapping) else [output]:
            if isinstance(value, Tensor) and value.requires_grad:
                value.float().pow(2).sum().backward(retain_graph=True)
                break
        assert streams.current() is None
    finally:
        streams.remove()
        for handle in handles:
            handle.remove()
        model.zero_grad()
    assert not _hooks(model)
    return seen


def _hooks(model: nn.Module) -> int:
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(),
             *m._forward_pre_hooks.values())]  # fmt: skip
    return sum(h.__module__.startswith("curvfast") for h in hooks)
