"""Colours and marks that mean the same in every figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METHOD_STYLES = {
    "base": ("unedited model", "#1b1b1e", "*"),
    "kfac": ("K-FAC (curvfast)", "#0b6e4f", "o"),
    "svd": ("truncated SVD", "#c8553d", "s"),
    "random": ("random pairs", "#8d99ae", "^"),
    "bsn": ("BalancedSubnet, told of half of both", "#3a6ea5", "D"),
    "bsn_speeches": ("BalancedSubnet, told of half the speeches", "#8e6bbf", "v"),
}
"""Label, colour and marker."""


def plain(axes: Axes) -> None:
    """Give axes a faint grid and two spines."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
