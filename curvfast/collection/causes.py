"""Causes: why rows that are left out hold curvature, or rows that count hold none.

Read only when there is something to say.
"""

from __future__ import annotations

from torch import Tensor, nn

from curvfast.collection.leaks import Leak
from curvfast.collection.verdict import HARMLESS, INFERRED, MASKED
from curvfast.model.identity import unwrap

_OUT = "Pass rows=(name, shape) -> bool mask to say which rows count"


def cause_of_leak(model: nn.Module, leak: Leak) -> tuple[str, str]:
    """Return whether rows that hold curvature were left out by a mask of the call, and why they do.

    Args:
        model: Whose config tells of a router's loss.
        leak: What one layer's left-out rows hold.
    """
    by_rule, _, before_first = leak.outside.tolist()
    rows, shape = leak.example
    if getattr(getattr(unwrap(model), "config", None), "output_router_logits", False):
        return MASKED, (
            "output_router_logits adds the routers' own loss to the gradient, at every position. "
            "Leave it off to measure the curvature of the language modelling loss alone"
        )
    if before_first:
        return MASKED, (
            "The last pad on the left predicts the first token, whose label is scored, and may "
            "attend to every position: set the label of each first token to -100, or pad on the "
            "right"
        )
    if not by_rule:
        return MASKED, (
            "Labels of padding are scored because they are not -100; or the loss reaches padding "
            "from inside the model, which pools over positions, mixes them by a convolution or a "
            "Fourier transform, or attends without the mask; or the mask is not of these rows. "
            f"{_OUT}"
        )
    if rows.packed(shape):
        return MASKED, (
            "Documents in one row attend to each other, so the last token of one reaches the "
            "labels of the next: transformers keeps them apart only without attention_mask and "
            "with use_cache=False"
        )
    return INFERRED, (
        "The token stream is not causal, or its rows lie in another order than was read off their "
        f"shape. Pass skip_last=False if a position predicts its own label. {_OUT}"
    )


def cause_unreached(counted: Tensor, reached: Tensor) -> tuple[str, str]:
    """Return whether counted positions without a gradient follow a mask of the call, and why.

    Args:
        counted: bool [sequences, length], positions that count.
        reached: bool [sequences, length], those with a gradient.
    """
    dead = (counted & ~reached).cpu()  # [sequences, length]
    ends = dead.int().cumprod(1) | dead.flip(1).int().cumprod(1).flip(1)
    if (dead & ~ends.bool()).any():
        # Inside a sequence: embeddings that the model replaces (masked tokens), or positions that
        # have no label, in a model that mixes none.
        return HARMLESS, ""
    alone = dead.sum(1) <= 1
    if alone.all() and dead[:, -1].any():
        return INFERRED, (
            "They are the last of their sequences, so the model is causal: pass skip_last=True"
        )
    return INFERRED, (
        "They lie at an end of the sequences, as padding does: the mask was not seen. Call "
        f"curvature.mask(mask) before the model, or pass attention_mask to it. {_OUT}"
    )
