"""factorize(): edited layers stored as two low-rank factors where those have fewer parameters.

Take the first s rows of what a staircase keeps whole, and of the rows below only the k columns they
still use: W' = U_G[:, :s] (M ∘ C)[:s] U_Aᵀ + U_G[:, s:] (M ∘ C)[s:, :k] U_A[:, :k]ᵀ has rank s + k,
and s may be chosen. By König's theorem the least s + k is the largest number of kept pairs of which
no two share a row or a column, which is the rank of M ∘ C unless C is exceptional: no product of
two is smaller for them all. s = 0 and s = r_g are the bounding rectangle folded to either side.

The rectangle left as three factors U_G C U_Aᵀ, of r_g d_out + r_g r_a + r_a d_in numbers, never has
fewer than the min(r_g, r_a) (d_out + d_in) of the better of those two.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from curvfast.display import aligned
from curvfast.distributed import is_sharded_model
from curvfast.editing.plan import EditArguments, EditStep, plan_edit, relative_change
from curvfast.editing.report import as_json
from curvfast.errors import InputError
from curvfast.kfac.eigenbasis import Eigenbasis
from curvfast.kfac.layer_basis import LayerBasis
from curvfast.kfac.projection import working_dtype
from curvfast.kfac.selection.mask import Mask
from curvfast.kfac.selection.staircase import Staircase
from curvfast.model.families import LinearLayer


def cover(kept: Staircase | Mask) -> tuple[Tensor, Tensor]:
    """Return a small cover: rows and columns that together contain every kept pair.

    Args:
        kept: The kept pairs of a layer.

    Returns:
        Indices of rows and of columns, int64: for a staircase a minimum cover; for any other mask
        the rows used, or the columns if those are fewer.
    """
    if isinstance(kept, Staircase):
        widths = nn.functional.pad(kept.widths.cpu().long(), (0, 1))
        rows = int((torch.arange(len(widths), device="cpu") + widths).argmin())
        return torch.arange(rows, device="cpu"), torch.arange(int(widths[rows]), device="cpu")
    used = [kept.dense().any(dim).nonzero()[:, 0].cpu() for dim in (1, 0)]
    none = torch.arange(0, device="cpu")
    return (used[0], none) if len(used[0]) <= len(used[1]) else (none, used[1])


def low_rank_factors(
    weight: Tensor, basis: LayerBasis, kept: Staircase | Mask
) -> tuple[Tensor, Tensor]:
    """Return L and R with W' = L R.

    Args:
        weight: W, [d_out, d_in], any float dtype; computed in float32, or float64 if it is.
        basis: The layer's eigenbasis.
        kept: The kept pairs.

    Returns:
        L [d_out, r] and R [r, d_in] in the working dtype, r being the size of :func:`cover`.
    """
    dtype, device = working_dtype(weight), weight.device
    weight = weight.to(dtype)
    u_g, u_a = (v.to(device, dtype) for v in (basis.vectors_g, basis.vectors_a))
    mask = kept.dense()[: u_g.shape[1], : u_a.shape[1]].to(device)
    rows, columns = (index.to(device) for index in cover(kept))
    others = torch.ones(u_g.shape[1], dtype=torch.bool, device=device)
    others[rows] = False
    above = (u_g[:, rows].T @ weight @ u_a) * mask[rows]
    below = (u_g[:, others].T @ (weight @ u_a[:, columns])) * mask[others][:, columns]
    left = torch.cat([u_g[:, rows], u_g[:, others] @ below], 1)
    right = torch.cat([above @ u_a.T, u_a[:, columns].T])
    return left, right


LOW_RANK, DENSE = "low rank", "dense"


class FactoredLinear(nn.Sequential):
    """y = L (R x) + b with L [d_out, r] and R [r, d_in]: a linear layer of rank r.

    Its children ``right`` and ``left`` are ``nn.Linear``, whose weights are R and L; the latter has
    the bias.
    """

    right: nn.Linear
    left: nn.Linear

    def __init__(
        self, in_features: int, out_features: int, rank: int, *, bias: bool, dtype: torch.dtype
    ) -> None:
        """Create the layer on the meta device, to be given its weights.

        Args:
            in_features: d_in.
            out_features: d_out.
            rank: r.
            bias: Whether it has a bias.
            dtype: Dtype of the weights.
        """
        with warnings.catch_warnings():
            # Rank 0 results if nothing is kept.
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            # On the meta device nothing is initialised, so no random number is drawn.
            right = nn.Linear(in_features, rank, bias=False, device="meta", dtype=dtype)
            left = nn.Linear(rank, out_features, bias=bias, device="meta", dtype=dtype)
        super().__init__(OrderedDict(right=right, left=left))

    @property
    def in_features(self) -> int:
        """d_in."""
        return self.right.in_features

    @property
    def out_features(self) -> int:
        """d_out."""
        return self.left.out_features

    @property
    def rank(self) -> int:
        """r, the width between the factors."""
        return self.left.in_features

    @property
    def weight(self) -> Tensor:
        """W' = L R, [d_out, d_in], computed at each access: for code that reads ``weight``."""
        return self.left.weight @ self.right.weight

    @property
    def bias(self) -> Tensor | None:
        """b, [d_out]."""
        return self.left.bias


@dataclass(frozen=True)
class LayerForm:
    """The form of one layer after :func:`factorize`. Biases are not counted."""

    name: str
    form: str
    """``"low rank"``, or ``"dense"`` where two factors would have more parameters."""
    rank: int
    """Upper bound of the rank of W'; the width between the factors."""
    parameters_before: int
    """d_out · d_in."""
    parameters_after: int
    pairs: int
    """Eigenpairs kept."""
    mass: float
    """Kept share of the layer's curvature mass."""
    relative_change: float
    """‖W' − W‖ / ‖W‖ in Frobenius norm."""


@dataclass(frozen=True)
class FactorReport:
    """Report of :func:`factorize`, layer by layer; prints as a table. Biases are not counted."""

    layers: tuple[LayerForm, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Provenance, JSON-able: model, rule, factors."""

    @property
    def parameters_before(self) -> int:
        """Parameters in the weights of these layers before."""
        return sum(layer.parameters_before for layer in self.layers)

    @property
    def parameters_after(self) -> int:
        """Parameters in the weights of these layers now."""
        return sum(layer.parameters_after for layer in self.layers)

    @property
    def flops_before(self) -> int:
        """FLOPs of these layers per token before: two per parameter."""
        return 2 * self.parameters_before

    @property
    def flops_after(self) -> int:
        """FLOPs of these layers per token now."""
        return 2 * self.parameters_after

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        return {
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "layers": [as_json(layer) for layer in self.layers],
            "provenance": dict(self.provenance),
        }

    def __str__(self) -> str:
        """Return the report as an aligned table."""
        head = ["layer", "form", "rank", "before", "after"]
        rows = [
            [e.name, e.form, str(e.rank), str(e.parameters_before), str(e.parameters_after)]
            for e in self.layers
        ]
        share = self.parameters_after / max(1, self.parameters_before)
        return (
            f"{aligned([head, *rows], left=2)}\n"
            f"{share:.1%} of the parameters, and of the FLOPs a token, of these layers"
        )


def factorize(model: nn.Module, basis: Eigenbasis, **rule: Unpack[EditArguments]) -> FactorReport:
    """Edit a model as :func:`curvfast.edit` does, and replace layers by factors of the edited ones.

    A layer whose W' is a product of two factors of fewer numbers than d_out · d_in becomes a
    :class:`FactoredLinear` of its dtype, with its bias; it computes the edited layer to rounding.
    Any other layer is edited in place. Everything is checked before the first is replaced. Create
    objects that hold the model's parameters, such as optimizers or DistributedDataParallel, after.

    Args:
        model: The model the basis was measured on; changed in place.
        basis: Eigenbases by layer name.
        rule: ``mass``, ``layers``, ``fraction``, ``pairs``, ``selection``, ``importance`` and
            ``corrections``, as in :func:`curvfast.edit`.

    Returns:
        Form, rank and parameters of each layer, before and after.

    Raises:
        InputError: If a layer is not an ``nn.Linear`` or transformers' ``Conv1D`` by itself, has
            hooks, or is sharded, or the strength is not 1; and whatever else
            :func:`curvfast.edit` raises.
    """
    plan = plan_edit(model, basis, **rule)
    if plan.strength != 1:
        raise InputError(
            f"strength={plan.strength}: only the whole edit, of strength 1, has low rank"
        )
    for step in plan.steps:
        _refuse(model, step.layer)
    return FactorReport(tuple(_give_form(model, step) for step in plan.steps), plan.provenance)


def factored_layers(model: nn.Module) -> dict[str, FactoredLinear]:
    """Return the factored layers of a model, by every name they have."""
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if isinstance(module, FactoredLinear)}


def _give_form(model: nn.Module, step: EditStep) -> LayerForm:
    layer, kept = step.layer, step.kept
    weight = layer.matrix()
    rank, before = sum(map(len, cover(kept))), weight.numel()
    after = rank * (layer.d_out + layer.d_in)
    vectors = step.vectors(weight)
    if vectors is not None and after < before:
        form = LOW_RANK
        left, right = low_rank_factors(weight, vectors, kept)
        change = relative_change(weight, left @ right)
        _replace(model, layer.module, _factored(layer, left, right))
    else:
        form, after, new = DENSE, before, step.edited(weight, vectors).weight
        change = relative_change(weight, new)
        layer.write(new)
    return LayerForm(layer.name, form, rank, before, after, kept.pairs, kept.mass, change)


def _factored(layer: LinearLayer, left: Tensor, right: Tensor) -> FactoredLinear:
    old: Any = layer.module
    dtype, trained = layer.parameter.dtype, layer.parameter.requires_grad
    new = FactoredLinear(
        layer.d_in, layer.d_out, len(right), bias=old.bias is not None, dtype=dtype
    )
    new.left.weight = nn.Parameter(left.to(dtype), requires_grad=trained)
    new.right.weight = nn.Parameter(right.to(dtype), requires_grad=trained)
    if old.bias is not None:
        new.left.bias = old.bias
    return new.train(old.training)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def _refuse(model: nn.Module, layer: LinearLayer) -> None:
    module = layer.module
    plain = type(layer) is LinearLayer and (layer.transposed or type(module) is nn.Linear)
    if not plain:
        raise InputError(
            f"layer {layer.name!r} is of {type(module).__name__}: only nn.Linear and transformers' "
            "Conv1D can be replaced by factors; leave it out of layers="
        )
    if module is model:
        raise InputError("the model is itself the layer: put it into a module to have it replaced")
    if is_sharded_model(module):
        raise InputError(f"layer {layer.name!r} is sharded: factorize before fully_shard")
    hooks = (
        module._forward_hooks, module._forward_pre_hooks,
        module._backward_hooks, module._backward_pre_hooks,
    )  # fmt: skip
    if any(hooks) or "forward" in vars(module):
        raise InputError(
            f"layer {layer.name!r} has hooks, which the new module would not have: end what put "
            "them there (a collect() block, accelerate's dispatch) before"
        )
