"""Forward: the arguments a model's forward takes, and its logits while it is frozen.

Names of arguments are asked of the model, of what it wraps, and of what it returns: none is taken
for granted, since libraries rename them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from curvfast.errors import InputError
from curvfast.model.identity import unwrap

_HIDING = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True, eq=False)
class Forward:
    """The arguments of a model's forward, those that a wrapper passes on included."""

    model: str
    """Name of the model's class, for errors."""
    signature: inspect.Signature
    """The outermost that names an argument: where positional arguments go."""
    names: frozenset[str]
    """Of every argument known to be taken."""
    cached: bool
    """Whether ``use_cache`` decides if a cache is made."""
    generates: bool
    """Whether one token after another can be read off it."""

    @property
    def uncached(self) -> dict[str, bool]:
        """The argument with which no cache is made; nothing, where none ever is."""
        return {"use_cache": False} if self.cached else {}

    def first(self) -> str:
        """Return the name of the argument that a call with one tensor fills.

        Raises:
            InputError: If the forward takes ``*args`` and names none.
        """
        for parameter in self.signature.parameters.values():
            if parameter.kind in _POSITIONAL:
                return parameter.name
        raise InputError(
            f"{self.model} does not tell what its forward reads, so a batch cannot be one tensor; "
            "pass keyword arguments of the model, such as {'input_ids': ...}"
        )

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of one call by name, whether the forward names them or not.

        A call that does not fit, which the forward itself will refuse, has none.
        """
        try:
            bound = self.signature.bind_partial(*args, **kwargs).arguments
        except TypeError:
            return {}
        for parameter in self.signature.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                bound = {**bound.pop(parameter.name, {}), **bound}
        return bound

    def batches(self, lengths: Sequence[int], size: int) -> Iterator[list[int]]:
        """Yield which texts to read together, by length, so that few tokens are padding.

        Padding on the left moves every position, and not all models read positions off the mask: a
        forward that takes no mask, or no ``position_ids``, gets texts of one length at a time.

        Args:
            lengths: Of the texts.
            size: Most texts at a time.
        """
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        padded = {"attention_mask", "position_ids"} <= self.names
        for _, run in groupby(order, key=lambda i: None if padded else lengths[i]):
            texts = list(run)
            yield from (texts[i : i + size] for i in range(0, len(texts), size))

    def carried(self, output: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return what an output holds for the next call: a cache, a recurrent state.

        It is known by being returned under the name of an argument: transformers' own has been
        ``past_key_values``, ``cache_params``, ``state`` and ``cache``.

        Args:
            output: What the forward returned.
            given: The arguments that the caller itself gives to every call.
        """
        own = {*given, "labels"}
        return {
            name: value
            for name, value in _fields(output).items()
            if name in self.names and name not in own and value is not None
        }


def forward_of(model: nn.Module) -> Forward:
    """Return what the forward of a model takes.

    A wrapper that takes ``**kwargs`` is taken to pass them on to what it wraps: data parallelism,
    ``torch.compile``, PEFT, or a function that was put in the place of the forward.

    Args:
        model: The model.
    """
    chain = list(_chain(model))
    found: list[inspect.Signature] = []
    names: set[str] = set()
    passes_on = True
    for signature in (s for module in chain for s in _signatures(module)):
        own = [p for p in signature.parameters.values() if p.kind not in _HIDING]
        if not own:
            continue
        found.append(signature)
        names |= {p.name for p in own}
        kinds = [p.kind for p in signature.parameters.values()]
        passes_on = inspect.Parameter.VAR_KEYWORD in kinds
        if not passes_on:
            break
    hidden = inspect.signature(lambda *args, **kwargs: None)
    says = _says_it_generates(chain)
    config = any(hasattr(getattr(module, "config", None), "use_cache") for module in chain)
    return Forward(
        model=type(model).__name__,
        signature=found[0] if found else hidden,
        names=frozenset(names),
        # Some models of transformers leave it to their **kwargs.
        cached="use_cache" in names or bool(says and passes_on and config),
        generates="input_ids" in names if says is None else says,
    )


def _chain(model: nn.Module) -> Iterator[nn.Module]:
    """Yield a model, and what it wraps."""
    wrapped: Any = model
    while isinstance(wrapped, nn.Module):
        yield wrapped
        inner = getattr(wrapped, "module", None) or getattr(wrapped, "_orig_mod", None)
        if inner is None:
            # peft keeps the model it wraps behind this method.
            base = getattr(wrapped, "get_base_model", None)
            inner = base() if callable(base) else None
        wrapped = None if inner is wrapped else inner


def _signatures(module: nn.Module) -> Iterator[inspect.Signature]:
    """Yield the signature of a forward, then that of its class where another was put before it."""
    forwards = [module.forward]
    if "forward" in vars(module):
        forwards.append(partial(type(module).forward, module))
    for forward in forwards:
        # A scripted forward has none.
        with suppress(TypeError, ValueError):
            yield inspect.signature(forward)


def _says_it_generates(chain: list[nn.Module]) -> bool | None:
    """Return what the model's ``can_generate`` answers, or None if it has none."""
    for module in chain:
        says = getattr(module, "can_generate", None)
        if callable(says):
            # A prompt alone is no input for an encoder-decoder.
            config = getattr(module, "config", None)
            return bool(says()) and not getattr(config, "is_encoder_decoder", False)
    return None


def _fields(output: Any) -> dict[str, Any]:
    if isinstance(output, Mapping):
        return dict(output)
    if is_dataclass(output):
        return {field.name: getattr(output, field.name) for field in fields(output)}
    return output._asdict() if hasattr(output, "_asdict") else {}


@contextmanager
def frozen(model: nn.Module, keep_mode: bool) -> Iterator[bool]:
    """Freeze the parameters inside the block.

    Args:
        model: Its modes and ``requires_grad`` are as before afterwards.
        keep_mode: Whether it stays in its mode; otherwise it is in eval mode.

    Yields:
        Whether no activation is recomputed.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    modes = [(module, module.training) for module in model.modules()]
    handle: RemovableHandle | None = None
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        if not keep_mode:
            model.eval()
        checkpointing = model.training and getattr(
            unwrap(model), "is_gradient_checkpointing", False
        )
        if checkpointing:
            # A checkpointed region passes gradients on only if one of its inputs asks for them.
            embedding = unwrap(model).get_input_embeddings()  # type: ignore[operator]
            handle = embedding.register_forward_hook(lambda _m, _a, y: y.requires_grad_())
        yield not checkpointing
    finally:
        if handle is not None:
            handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode


def input_device(model: nn.Module) -> torch.device:
    """Return the device that a model's input must be on, also where weights are offloaded.

    Args:
        model: One whose hooks (of accelerate) say where it runs, or else whose input embedding or
            first weight that is in memory tells.
    """
    find = getattr(unwrap(model), "get_input_embeddings", None)
    embedding: nn.Module | None = None
    with suppress(NotImplementedError, AttributeError):
        embedding = find() if callable(find) else None
    for module in (m for m in (embedding, *model.modules()) if m is not None):
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    parameters = [*(embedding.parameters() if embedding else ()), *model.parameters()]
    tensors = [*parameters, *model.buffers()]
    present = [t for t in tensors if t.device.type != "meta"]
    return next((t.device for t in present or tensors), torch.device("cpu"))


def model_arguments(model: nn.Module, batch: Any, device: torch.device) -> dict[str, Any]:
    """Return what a model is called with for a batch, on a device and without a cache.

    Args:
        model: The model.
        batch: Keyword arguments of it, or the tensor that is its one argument.
        device: Where tensors are moved.

    Raises:
        InputError: If the batch is neither, or the one argument cannot be told.
    """
    forward = forward_of(model)
    if isinstance(batch, Tensor):
        batch = {forward.first(): batch}
    if not isinstance(batch, Mapping):
        raise InputError(
            f"a batch is a {type(batch).__name__}; pass keyword arguments of the model, such as "
            "{'input_ids': ..., 'attention_mask': ...}, or a tensor that is its one argument"
        )
    arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return {**forward.uncached, **arguments}


def logits_of(output: Any) -> Tensor:
    """Return the logits that a model's output is, or has.

    Raises:
        InputError: If there are none.
    """
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if not isinstance(found, Tensor):
        raise InputError(
            f"the model returned {type(output).__name__} without logits, so no label can be drawn; "
            "use the model with its head, or curvfast.collect() around a loop with its own loss"
        )
    return found
