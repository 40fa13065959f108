"""Experts of a mixture, stacked in 3-D parameters of one module, as in transformers.

Each slice is a layer, ``<module>.<expert>.<parameter>``, and only tokens routed to the expert are
its rows. The module is recognised by the attributes of transformers' experts interface.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from curvfast.model.layer import LinearLayer, why_unwritable

# Those whose products can be seen; others run in one kernel.
SEEN = ("eager", "grouped_mm", "batched_mm")


@dataclass(frozen=True)
class ExpertLayer(LinearLayer):
    """One expert's slice of a stacked parameter."""

    expert: int = 0

    @property
    def sliced(self) -> bool:
        """Whether the weight is a slice of the parameter: it is."""
        return True

    def why_read_only(self) -> str | None:
        """Return the reason why the slice is never edited, or None.

        Its own products are seen, not the module's output.
        """
        return self.unwritable

    def stored(self) -> Tensor:
        """Return the slice as it is stored, a view without gradient."""
        return self.parameter.detach()[self.expert]


def expert_layers(name: str, module: nn.Module) -> list[LinearLayer]:
    """Return a layer for every expert and stacked parameter of ``module``."""
    stacked = _stacked(module)
    if not stacked or why_not(module):
        return []
    transposed = bool(module.is_transposed)
    found: list[LinearLayer] = []
    for expert in range(int(module.num_experts)):  # type: ignore[arg-type]
        for leaf, parameter in stacked.items():
            rows, columns = parameter.shape[1:]
            d_out, d_in = (columns, rows) if transposed else (rows, columns)
            found.append(
                ExpertLayer(
                    ".".join(filter(None, (name, str(expert), leaf))), module, d_in, d_out,
                    transposed=transposed, leaf=leaf, expert=expert,
                    unwritable=why_unwritable(parameter, tuple(parameter.shape)),
                )
            )  # fmt: skip
    return found


def why_not(module: nn.Module) -> str | None:
    """Return the reason why experts of a mixture are not supported, or None."""
    stacked = _stacked(module)
    if not stacked:
        return None
    name = type(module).__name__
    known = isinstance(getattr(module, "is_transposed", None), bool) and all(
        parameter.shape[0] == module.num_experts
        and parameter.stride(0) == parameter[0].numel()
        and why_unwritable(parameter, tuple(parameter.shape)) is None
        for parameter in stacked.values()
    )
    if not known:
        return f"{name}: experts that are not stored as by transformers' experts interface"
    chosen = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if chosen not in (None, *SEEN):
        return (
            f"{name} with experts_implementation={chosen!r}: its products run in one kernel, unseen"
            "; call model.set_experts_implementation('grouped_mm') or 'eager' before"
        )
    return None


def _stacked(module: nn.Module) -> dict[str, nn.Parameter]:
    if not hasattr(module, "num_experts"):
        return {}
    return {
        leaf: parameter
        for leaf, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() == 3
    }
