"""Foresight: whether a prediction depends on later positions, asked of a model by a gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvfast.model.forward import logits_of
from curvfast.model.identity import says_causal, unwrap

LONGEST = 32
"""Most positions that are asked about, of a model of text alone."""
SHORTEST = 3
"""Fewest real positions of a row with one before and one after the position that is asked."""


@dataclass
class Foresight:
    """What one probe of a model found."""

    later: bool | None = None
    """Whether a prediction depends on later positions; None where that could not be asked."""
    vocabulary: bool = False
    """Whether there are as many outputs as tokens in the input's vocabulary."""
    causal_output: bool = False
    """Whether the output is of a class that transformers gives causal language models."""


def probe(model: nn.Module, arguments: Mapping[str, Any]) -> Foresight:
    """Ask a model whether the prediction at a position depends on later ones.

    One forward, where possible of a few tokens of one row, and one backward from their middle to
    the output of the input embedding: of a causal model the gradient of later positions is exactly
    zero. Nothing of it stays: no gradient of a weight, and no random number is drawn from the
    global generators.

    Args:
        model: In a :func:`curvfast.model.forward.frozen` block, without hooks that count.
        arguments: What it is called with.
    """
    found = Foresight()
    if _tokens(arguments) is None and not isinstance(arguments.get("inputs_embeds"), Tensor):
        return found
    with torch.random.fork_rng(_devices(model)), torch.enable_grad():
        part = _window(arguments)
        if part is None:
            return _asked(model, arguments)
        try:
            return _asked(model, part)
        except Exception:
            # Some models take no shorter input than the whole.
            return _asked(model, arguments)


def _asked(model: nn.Module, arguments: Mapping[str, Any]) -> Foresight:
    found, mask = Foresight(), arguments.get("attention_mask")
    with _embedded(model, arguments) as (own, places):
        output = model(**own)
    found.causal_output = says_causal(output)
    logits = logits_of(output)
    if len(places) != 1 or logits.dim() != 3 or not logits.requires_grad:
        return found
    embedded, size = places[0]
    shape = embedded.shape[:2]
    if logits.shape[:2] != shape:
        return found
    found.vocabulary = logits.shape[-1] in _sizes(model, size)
    real = _real(mask, shape, logits.device)
    row = int(real.sum(1).argmax())
    where = real[row].nonzero().flatten()  # [real positions]
    if len(where) < SHORTEST:
        return found
    middle = int(where[(len(where) - 1) // 2])
    one = logits[row, middle].float()  # [classes]
    # Uneven weights: a sum of outputs may not depend on anything.
    weights = torch.linspace(0.5, 1.5, len(one), device=one.device).cos()
    try:
        (gradient,) = torch.autograd.grad((one * weights).sum(), embedded, allow_unused=True)
    except RuntimeError:
        return found
    if gradient is None:
        return found
    reach = gradient[row].float().abs().amax(-1)  # [length]
    earlier, later = float(reach[:middle].max()), float(reach[middle + 1 :].max())
    if later or earlier:
        # A prediction of its own position alone says nothing of order.
        found.later = later > 0
    return found


def _window(arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a call with a few real tokens of the longest row, where it is of text alone."""
    tensors = {k: v for k, v in arguments.items() if isinstance(v, Tensor)}
    tokens = _tokens(arguments)
    grid = (tensors["inputs_embeds"] if tokens is None else tokens).shape[:2]
    if any(v.shape[:2] != grid for v in tensors.values()):
        return None
    mask = tensors.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        return None
    row, start = 0, 0
    if mask is not None:
        real = mask.bool()
        row = int(real.sum(1).argmax())
        start = int(real[row].int().argmax())
    cut = {k: v[row : row + 1, start : start + LONGEST] for k, v in tensors.items()}
    return {**arguments, **cut}


@contextmanager
def _embedded(
    model: nn.Module, arguments: Mapping[str, Any]
) -> Iterator[tuple[dict[str, Any], list[tuple[Tensor, int | None]]]]:
    """Let the embedded tokens of the next call ask for a gradient.

    Yields:
        The arguments to call the model with, and a list to be filled with the embedded tokens, each
        with the number of rows of its table.
    """
    places: list[tuple[Tensor, int | None]] = []
    given = arguments.get("inputs_embeds")
    if isinstance(given, Tensor):
        leaf = given.detach().requires_grad_()
        yield {**arguments, "inputs_embeds": leaf.clone()}, [(leaf, None)]
        return
    tokens = _tokens(arguments)
    if tokens is None:
        yield dict(arguments), places
        return

    def after(module: nn.Embedding, args: Any, output: Tensor) -> Tensor | None:
        read = args[0] if args else None
        if places or not isinstance(read, Tensor) or read.shape != tokens.shape:
            return None
        if not torch.equal(read.to(tokens.device), tokens):
            return None
        leaf = output.detach().requires_grad_()
        places.append((leaf, int(module.num_embeddings)))
        # Not the leaf: a model may add positions in place.
        return leaf.clone()

    handles = [
        module.register_forward_hook(after)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
    ]
    try:
        yield dict(arguments), places
    finally:
        for handle in handles:
            handle.remove()


def _tokens(arguments: Mapping[str, Any]) -> Tensor | None:
    """Return token ids [sequences, length], or None where the call has none."""
    named = [arguments[name] for name in ("input_ids",) if name in arguments]
    for value in (*named, *arguments.values()):
        if (
            isinstance(value, Tensor)
            and value.dim() == 2
            and value.dtype in (torch.int, torch.long)
        ):
            return value
    return None


def _real(mask: Any, shape: torch.Size, device: torch.device) -> Tensor:
    if isinstance(mask, Tensor) and mask.shape == shape:
        return mask.to(device).bool()
    return torch.ones(shape, dtype=torch.bool, device=device)


def _sizes(model: nn.Module, table: int | None) -> set[Any]:
    config = getattr(unwrap(model), "config", None)
    text = getattr(config, "text_config", None)
    sizes = {table, *(getattr(c, "vocab_size", None) for c in (config, text))}
    return sizes - {None}


def _devices(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})
