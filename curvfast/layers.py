"""Which linear layers of a model are meant, by kind, by name or by predicate.

Names are those of ``model.named_modules()`` less the wrappers of ``torch.compile`` and
``DistributedDataParallel``, so factors measured on a wrapped model fit the bare one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from curvfast.errors import LayerNotFound

LayerSpec = str | Iterable[str] | Callable[[str, nn.Module], bool]

KINDS = ("mlp", "attention", "all")
_ATTENTION = ("attn", "attention")
_MLP = ("mlp", "ffn", "feed_forward", "feedforward", "fc1", "fc2", "intermediate", "output")
_HEADS = ("lm_head", "embed_out", "classifier", "score", "cls", "qa_outputs", "head")
_WRAPPERS = ("module", "_orig_mod")


@dataclass(frozen=True)
class LinearLayer:
    """A linear map of the model: y = x Wᵀ + b with W [d_out, d_in]."""

    name: str
    module: nn.Module
    d_in: int
    d_out: int
    transposed: bool
    """True for Conv1D of GPT-2, which stores W as [d_in, d_out]."""

    @property
    def parameter(self) -> nn.Parameter:
        """The weight as the module stores it."""
        return self.module.weight  # type: ignore[return-value]

    def matrix(self) -> Tensor:
        """The weight as W [d_out, d_in], a view without gradient."""
        weight = self.parameter.detach()
        return weight.T if self.transposed else weight


def bare_name(name: str) -> str:
    """Return a module or parameter name without the components that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def linear_layers(model: nn.Module) -> dict[str, LinearLayer]:
    """Return every supported linear layer of ``model`` by bare name, in module order."""
    found = {}
    for full_name, module in model.named_modules():
        name = bare_name(full_name)
        layer = _as_linear(name, module)
        if layer is not None:
            found[name] = layer
    return found


def select(model: nn.Module, spec: LayerSpec) -> dict[str, LinearLayer]:
    """Return the layers that ``spec`` means.

    Args:
        model: Any module.
        spec: ``"mlp"``, ``"attention"`` or ``"all"`` (none of which takes output heads); a glob or
            several on layer names; or a predicate ``(name, module) -> bool``.

    Returns:
        Layers by name, in module order.

    Raises:
        LayerNotFound: If nothing matches (the message lists what there is), or a chosen layer
            shares its weight with another module.
    """
    available = linear_layers(model)
    chosen = {name: layer for name, layer in available.items() if matches(spec, name, layer.module)}
    if not chosen:
        listing = "\n  ".join(available) or "(none: the model has no nn.Linear or Conv1D)"
        raise LayerNotFound(
            f"layers={spec!r} matches no linear layer of this {type(model).__name__}; pass "
            f"{', '.join(map(repr, KINDS))}, a glob such as '*.mlp.*', or a predicate. "
            f"Its linear layers are:\n  {listing}"
        )
    _refuse_tied(model, chosen)
    return chosen


def matches(spec: LayerSpec, name: str, module: nn.Module | None = None) -> bool:
    """Say whether ``spec`` means the layer called ``name``."""
    if callable(spec):
        return bool(spec(name, module))  # type: ignore[arg-type]
    if isinstance(spec, str):
        if spec == "all":
            return kind(name) != "head"
        if spec in KINDS:
            return kind(name) == spec
        return fnmatchcase(name, spec)
    return any(matches(pattern, name, module) for pattern in spec)


def kind(name: str) -> str:
    """Return ``"attention"``, ``"mlp"``, ``"head"`` or ``"other"`` from a layer's name.

    Attention is looked for first: ``attention.output.dense`` of BERT belongs to it,
    ``output.dense`` to the MLP. Heads stand at the top of the model, so only the first component
    tells them.
    """
    parts = name.lower().split(".")
    if parts[0] in _HEADS or parts[-1] in ("lm_head", "embed_out"):
        return "head"
    if any(word in part for part in parts for word in _ATTENTION):
        return "attention"
    if any(word in part for part in parts for word in _MLP[:4]) or any(p in _MLP for p in parts):
        return "mlp"
    return "other"


def _as_linear(name: str, module: nn.Module) -> LinearLayer | None:
    if isinstance(module, nn.Linear):
        shape = (module.out_features, module.in_features)
        # Quantised subclasses pack their weight into another shape or dtype: not editable as W.
        if module.weight.shape != shape or not module.weight.is_floating_point():
            return None
        return LinearLayer(name, module, shape[1], shape[0], transposed=False)
    if any(f"{c.__module__}.{c.__name__}" == _CONV1D for c in type(module).__mro__):
        d_in, d_out = module.weight.shape  # type: ignore[misc, union-attr, operator]
        return LinearLayer(name, module, int(d_in), int(d_out), transposed=True)
    return None


_CONV1D = "transformers.pytorch_utils.Conv1D"


def _refuse_tied(model: nn.Module, chosen: Mapping[str, LinearLayer]) -> None:
    owners: dict[int, list[str]] = {}
    for full_name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(bare_name(full_name))
    for name, layer in chosen.items():
        others = sorted(set(owners[id(layer.parameter)]) - {name})
        if others:
            raise LayerNotFound(
                f"layer {name!r} shares its weight with {', '.join(map(repr, others))}, so neither "
                "its factors nor an edit would be its own; leave it out of layers="
            )
