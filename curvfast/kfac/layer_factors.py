"""LayerFactors: the Kronecker factors A and G of one layer, as sums over rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class LayerFactors:
    """Sums over rows of one linear layer; the means are its Kronecker factors."""

    a_sum: Tensor
    """Σ a aᵀ over inputs, [d_in, d_in] float32, symmetric. Layers fed by one tensor share it."""
    g_sum: Tensor
    """Σ g gᵀ over output gradients of the *summed* loss, [d_out, d_out] float32, symmetric."""
    rows_a: int
    """Rows in ``a_sum``."""
    rows_g: int
    """Rows in ``g_sum``."""
    a_weighted: Tensor | None = None
    """Σ ‖g‖² a aᵀ over the same rows, [d_in, d_in] float32; None unless ``marginals=True``."""
    g_weighted: Tensor | None = None
    """Σ ‖a‖² g gᵀ over the same rows, [d_out, d_out] float32; None unless ``marginals=True``."""

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return len(self.g_sum), len(self.a_sum)

    @property
    def A(self) -> Tensor:
        """E[a aᵀ], [d_in, d_in] float32."""
        return self.a_sum / max(1, self.rows_a)

    @property
    def G(self) -> Tensor:
        """E[g gᵀ], [d_out, d_out] float32, g being the gradient of the summed loss."""
        return self.g_sum / max(1, self.rows_g)
