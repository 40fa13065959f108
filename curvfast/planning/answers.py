"""Overrides on the meta device: fused attention, and the truth value of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

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
