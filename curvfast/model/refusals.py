"""Reasons why the parameters of a module have no factors, by the module's family."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from curvfast.model import experts, linear, patch_embedding
from curvfast.model.layer import PARAMETRISED


def unsupported_reason(module: nn.Module) -> str:
    """Return the reason why the parameters that ``module`` itself holds have no factors."""
    known = linear.why_not(module) or patch_embedding.why_not(module) or experts.why_not(module)
    if known:
        return known
    name = type(module).__name__
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding: no Kronecker factors"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return f"{name}: its fused kernels hide the gradients of the gates"
    if isinstance(module, nn.MultiheadAttention):
        return linear.FUSED_ATTENTION
    if isinstance(module, ParametrizationList):
        return PARAMETRISED
    if "norm" in name.lower():
        return "normalisation: not a linear map"
    if "router" in name.lower():
        return f"{name}: a router that multiplies by its weight itself, not an nn.Linear"
    return f"{name} is not supported"
