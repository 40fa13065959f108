"""LiveBytes: peak memory of tensors, counted as operations allocate and release them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(TorchDispatchMode):
    """A dispatch mode that counts the bytes of storages allocated inside the block until released.

    It works on the meta device as on any other: a storage there has a size and no memory. Buffers
    inside an operation are not counted.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        """Start at zero; the storages of ``existing`` are not counted."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        """Bytes alive."""
        self.peak = 0
        """Most bytes alive at once since the start."""
        self._known = WeakIdKeyDictionary(ref_type=weakref.ref)
        for tensor in existing:
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = True
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, storage.nbytes()).atexit = False

    def _release(self, count: int) -> None:
        self.now -= count
