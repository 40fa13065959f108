"""Hooks on the forward of a module that belong to that object, and to none of its copies.

A copy of a module, by ``copy.deepcopy``, a pickle or ``torch.save``, takes the module's dicts of
hooks along. While a hook of ours is in such a dict, the dict itself says how it is copied: without
ours. A shallow copy has the very same dicts, so each hook also asks whose forward it runs in.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd import forward_ad

_DICTS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
_OURS = "_left_out_of_copies"
_WAYS_TO_COPY = ("__deepcopy__", "__reduce_ex__")


class Removable(Protocol):
    """A hook that can be removed."""

    def remove(self) -> None:
        """Remove the hook."""


@dataclass
class Hooks:
    """Hooks on one module, removed together."""

    module: nn.Module
    handles: list[Any] = field(default_factory=list)
    """torch's own handles, of one entry each."""

    def remove(self) -> None:
        """Remove the hooks; with the last of ours the module's dicts are copied as ever."""
        for handle in self.handles:
            handle.remove()
            _unmark(self.module, handle.id)
        self.handles.clear()


def watch_forward(
    module: nn.Module,
    after: Callable[..., Any] | None = None,
    *,
    before: Callable[..., Any] | None = None,
    always: bool = False,
    prepend: bool = False,
) -> Removable:
    """Register hooks on the forward of this very module: no copy of it has them or runs them.

    The hooks stay out of compiled graphs.

    Args:
        module: The module.
        after: Forward hook ``(module, args, kwargs, output)``; what it returns, unless None,
            replaces the output.
        before: Forward pre-hook ``(module, args, kwargs)``.
        always: Whether ``after`` is called too, with output None, when the forward raised.
        prepend: Whether ``after`` runs before the hooks that are there.

    Returns:
        A handle that removes both.
    """
    hooks = Hooks(module)
    if before is not None:
        own = outside_graphs(_of(module, before))
        hooks.handles.append(module.register_forward_pre_hook(own, with_kwargs=True))
    if after is not None:
        own = outside_graphs(_of(module, after))
        hooks.handles.append(
            module.register_forward_hook(own, with_kwargs=True, always_call=always, prepend=prepend)
        )
    for handle in hooks.handles:
        _mark(module, handle.id)
    return hooks


def others_on_output(module: nn.Module) -> int:
    """Return how many forward hooks of others a module has: each may replace its output."""
    hooks = module._forward_hooks
    return len(hooks) - len(vars(hooks).get(_OURS, ()) if hasattr(hooks, "__dict__") else ())


def outside_graphs(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``hook``, excluded from compiled graphs if the compiler is in use."""
    # torch.compiler.disable loads the compiler, tens of megabytes, so only beside a compiled model.
    return torch.compiler.disable(hook) if "torch._dynamo" in sys.modules else hook


def in_transform() -> bool:
    """Return whether a transform of ``torch.func``, or forward-mode AD, is running."""
    if forward_ad._current_level >= 0:
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None


def _of(module: nn.Module, hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return the hook, standing aside wherever another module runs it."""
    own = weakref.ref(module)

    @wraps(hook)
    def of_its_own(called: nn.Module, *call: Any) -> Any:
        return hook(called, *call) if called is own() else None

    return of_its_own


def _mark(module: nn.Module, number: int) -> None:
    """Leave an entry out of every copy of the module's dicts of hooks."""
    for hooks in _holding(module, number):
        ours = vars(hooks).get(_OURS)
        if ours is None:
            ours = set()
            # On the dict itself: handles of others' hooks refer to it, so it cannot be replaced.
            vars(hooks)[_OURS] = ours
            vars(hooks)["__deepcopy__"] = partial(_deep, weakref.ref(hooks))
            vars(hooks)["__reduce_ex__"] = partial(_reduced, weakref.ref(hooks))
        ours.add(number)


def _unmark(module: nn.Module, number: int) -> None:
    for name in _DICTS:
        of_dict = getattr(getattr(module, name), "__dict__", {})
        ours = of_dict.get(_OURS)
        if ours is None:
            continue
        ours.discard(number)
        if not ours:
            for attribute in (_OURS, *_WAYS_TO_COPY):
                del of_dict[attribute]


def _holding(module: nn.Module, number: int) -> Iterator[Any]:
    for name in _DICTS:
        hooks = getattr(module, name)
        if number in hooks and hasattr(hooks, "__dict__"):
            yield hooks


def _others(hooks: Any) -> tuple[dict[Any, Any], dict[str, Any]]:
    """Return a dict's entries and attributes but for ours."""
    ours = vars(hooks)[_OURS]
    attributes = {k: v for k, v in vars(hooks).items() if k not in (_OURS, *_WAYS_TO_COPY)}
    return {k: v for k, v in hooks.items() if k not in ours}, attributes


def _deep(own: weakref.ref[Any], memo: dict[int, Any]) -> Any:
    hooks: Any = own()
    entries, attributes = _others(hooks)
    # Known before its entries are copied: a hook may lead back to its module.
    new = memo[id(hooks)] = type(hooks)()
    new.update((k, copy.deepcopy(v, memo)) for k, v in entries.items())
    vars(new).update(copy.deepcopy(attributes, memo))
    return new


def _reduced(own: weakref.ref[Any], protocol: int) -> tuple[Any, ...]:
    entries, attributes = _others(own())
    return OrderedDict, (), attributes or None, None, iter(entries.items())
