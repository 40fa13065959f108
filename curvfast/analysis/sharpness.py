"""Input-loss curvature: the squared Hessian norm of each example's loss in its input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.analysis.per_example import joined, mean_losses, split_labels
from curvfast.collection.step import gold_labels
from curvfast.display import Bar
from curvfast.errors import InputError
from curvfast.model.families import outside_graphs
from curvfast.model.forward import frozen, logits_of
from curvfast.model.identity import is_causal_lm, unwrap

Gradient = Callable[[Tensor], Tensor]
"""x [examples, ...] -> the gradient of each example's own loss with respect to x, of its shape."""
Losses = Callable[[Tensor], Tensor]
"""x [examples, ...] -> the loss of each example, [examples]."""
_TOKENS = "input_ids"


@dataclass(frozen=True, eq=False)
class InputCurvature:
    """Estimated input-loss curvature of each example."""

    curvature: Tensor
    """float64 [examples]: the estimate of tr(H²) = ‖H‖², H the Hessian of the example's loss with
    respect to its input. In nats² over the input's unit to the fourth."""
    loss: Tensor
    """float64 [examples]: mean cross-entropy in nats at the unperturbed input."""


def input_curvature(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | Tensor],
    *,
    probes: int = 10,
    h: float = 1e-3,
    seed: int = 0,
    skip_last: bool | None = None,
    progress: bool = True,
) -> InputCurvature:
    """Estimate the curvature of the loss of each example around its input, by random probes.

    Curv(x) = (1/n) Σ_v ‖(∇L(x + h v) - ∇L(x)) / h‖², v having n random signs as entries: by
    Hutchinson's estimate E‖H v‖² = tr(H²) as h → 0. Source: Garg, Ravikumar and Roy, "Memorization
    Through the Lens of Curvature of Loss Function Around Samples", ICML 2024 (arXiv 2307.05831),
    which averages it over epochs of training; implementations of it in use leave out the division
    by h and the square, which changes no order by much. L is the mean over an example's labels, and
    x the embeddings of its tokens where a batch holds ``input_ids``, else its pixels, or whatever
    floats the batch holds.

    A confident prediction is flat to all orders: where the loss is near 0 the curvature is too,
    however near a steep region is. A larger ``h`` probes that far. Modes, gradients and the global
    random state are as before, and no parameter gets a gradient; 1 + ``probes`` forwards and
    backwards a batch, and one forward.

    Args:
        model: As in :func:`curvfast.collect_from`; in eval mode meanwhile. No example may see
            another of its batch.
        batches: As in :func:`curvfast.collect_from`, with ``labels`` unless the model is a causal
            language model, which predicts the next tokens. -100 is no label: so the loss may be of
            part of a text.
        probes: n, at least 1.
        h: Step of a probe in every entry of the input, positive, in its units. For a much smaller
            one, rounding dominates the gradient differences of float32 models.
        seed: Seed of the signs.
        skip_last: As in :func:`curvfast.collect`.
        progress: Whether a bar counts examples (on a terminal only).

    Returns:
        Curvature and loss of every example, in the order of ``batches``.

    Raises:
        InputError: If an argument is out of range, there is no example, an example has no label, or
            a batch holds neither tokens of a model with an embedding, nor one tensor of floats.
    """
    if probes < 1 or not 0 < h < float("inf"):
        raise InputError(f"probes={probes}, h={h}: pass at least one probe, and a positive step")
    causal = is_causal_lm(model) if skip_last is None else skip_last
    generator = torch.Generator().manual_seed(seed)
    curvatures, losses = [], []
    with (
        frozen(model, keep_mode=False),
        Bar("curvature", None, "example", progress) as bar,
    ):
        for batch in batches:
            arguments, gold = split_labels(model, batch)
            with _entered(model, arguments, gold, causal) as (x, losses_at):
                gradient = partial(_gradient, losses_at)
                found = squared_curvature(gradient, x, probes=probes, h=h, generator=generator)
                with torch.no_grad():
                    losses.append(losses_at(x).double().cpu())
            curvatures.append(found.cpu())
            bar.advance(len(found))
    return InputCurvature(joined(curvatures), joined(losses))


def squared_curvature(
    gradient: Gradient, x: Tensor, *, probes: int, h: float, generator: torch.Generator
) -> Tensor:
    """Return (1/n) Σ_v ‖(∇L(x + h v) - ∇L(x)) / h‖² of each example, v being random signs.

    Args:
        gradient: ∇L.
        x: [examples, ...], float.
        probes: n.
        h: The step size.
        generator: Generator of the signs, on the CPU.

    Returns:
        float64 [examples]. Of a quadratic loss ½ xᵀQx a probe gives ‖Qv‖² for any ``h``, and their
        mean over all signs is ‖Q‖².
    """
    base = gradient(x)
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for _ in range(probes):
        signs = 2 * torch.randint(0, 2, x.shape, generator=generator) - 1
        change = gradient(x + h * signs.to(x)) - base
        total += (change.double() / h).flatten(1).square().sum(1)
    return total / probes


def _gradient(losses_at: Losses, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(losses_at(x).sum(), x)[0]


@contextmanager
def _entered(
    model: nn.Module, arguments: dict[str, Any], gold: Tensor | None, causal: bool
) -> Iterator[tuple[Tensor, Losses]]:
    """Yield the input of a batch as floats, and the losses of the model at another one."""
    name = _entrance(arguments)

    def losses_at(x: Tensor) -> Tensor:
        if name == _TOKENS:
            current[:] = [x]
            logits = logits_of(model(**arguments))
            if current:
                raise InputError(
                    "the model read its input_ids without calling its input embedding, so they "
                    "cannot be moved: was it compiled? Pass the model as it was before"
                )
        else:
            logits = logits_of(model(**{**arguments, name: x}))
        return mean_losses(logits, gold_labels(arguments, gold, logits, causal))

    if name != _TOKENS:
        yield arguments[name], losses_at
        return
    current: list[Tensor] = []
    embedding = _embedding(model)
    with torch.no_grad():
        x = embedding(arguments[_TOKENS])
    hook = outside_graphs(lambda *_: _replaced(current))
    handle = embedding.register_forward_hook(hook)
    try:
        yield x, losses_at
    finally:
        handle.remove()


def _replaced(current: list[Tensor]) -> Tensor:
    """Return the tensor that replaces the embedding's output, once a forward."""
    if not current:
        raise InputError(
            "the model calls its input embedding twice in one forward (encoder and decoder share "
            "it?), so whose input is moved cannot be told; pass inputs_embeds instead of input_ids"
        )
    return current.pop()


def _entrance(arguments: Mapping[str, Any]) -> str:
    """Return the name of the model's input argument."""
    if isinstance(arguments.get(_TOKENS), Tensor):
        return _TOKENS
    floats = [k for k, v in arguments.items() if isinstance(v, Tensor) and v.is_floating_point()]
    if len(floats) != 1:
        raise InputError(
            f"a batch holds {list(arguments)}, of these floating {floats}: which is the input? "
            "Pass 'input_ids', or exactly one tensor of floats, such as 'pixel_values'"
        )
    return floats[0]


def _embedding(model: nn.Module) -> nn.Module:
    find = getattr(unwrap(model), "get_input_embeddings", None)
    found = find() if callable(find) else None
    if not isinstance(found, nn.Module):
        raise InputError(
            f"{type(model).__name__} has no get_input_embeddings(), so tokens cannot be moved; "
            "pass floats ('inputs_embeds'), or a model of transformers"
        )
    return found
