"""Meta copies of models, overrides of what they cannot answer, and LiveBytes: their peak memory."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary

from curvfast.errors import InputError
from curvfast.model.identity import unwrap


def meta_twin(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` on the meta device, in eval mode; no weight is copied.

    Tied parameters stay tied. The model itself is untouched.

    Raises:
        InputError: If something its modules hold cannot be copied.
    """
    model = unwrap(model)
    tensors = [*model.parameters(), *model.buffers()]
    # deepcopy reuses what it finds in its memo.
    memo: dict[int, Any] = {id(tensor): _shape_of(tensor) for tensor in tensors}
    try:
        return copy.deepcopy(model, memo).eval()
    except TypeError as error:
        raise InputError(
            f"this {type(model).__name__} holds what cannot be copied ({error}); plan with its "
            "configuration instead"
        ) from error


def on_meta(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch with its tensors on the meta device, without their values."""
    return {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in batch.items()}


def _shape_of(tensor: Tensor) -> Tensor:
    shape = torch.empty_like(tensor, device="meta")
    return nn.Parameter(shape) if isinstance(tensor, nn.Parameter) else shape


# The only fused attention of torch that runs on meta; it saves the same tensors as a GPU's.
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class MetaAnswers(TorchFunctionMode):
    """A function mode: attention is fused, and the bool of a meta tensor is True.

    torch would fall back to attention that keeps a score matrix, and raise on the bool.
    transformers asks whether a batch is unpadded, and whether it is not packed.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return True
        if func is scaled_dot_product_attention:
            return _flash_attention(*args, **kwargs)
        return func(*args, **kwargs)


def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(query.dtype)
    output: Tensor = _FLASH(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return output


def _attention(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> int:
    # Heads that share a key and value are multiplied by it one by one.
    heads = query[1]
    spread = (torch.Size((s[0], heads, *s[2:])) for s in (key, value))
    return int(sdpa_flop_count(query, *spread))


def _attention_backward(
    grad: Any, query: Any, key: Any, value: Any, *rest: Any, **options: Any
) -> int:
    heads = query[1]
    spread = (torch.Size((s[0], heads, *s[2:])) for s in (key, value))
    return int(sdpa_backward_flop_count(grad, query, *spread))


FLASH_FLOPS = {_FLASH: _attention, _FLASH_BACKWARD: _attention_backward}
"""For ``FlopCounterMode``, which has no formula for this kernel."""


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
