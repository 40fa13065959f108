"""Selections of eigenpairs that ignore curvature."""

from __future__ import annotations

from curvfast.core.eigenbasis import Eigenbasis
from curvfast.core.mask import random_mask
from curvfast.core.selection import Selection


def random_selection(basis: Eigenbasis, like: Selection, seed: int) -> Selection:
    """Keep as many eigenpairs of each layer as ``like`` does, chosen uniformly at random.

    Args:
        basis: Gives the shapes.
        like: Gives the numbers of pairs.
        seed: Seed of the choice.

    Returns:
        An explicit mask for each layer.
    """
    return Selection(
        {
            name: random_mask(
                len(basis[name].values_g),
                len(basis[name].values_a),
                like[name].pairs,
                seed + number,
            )
            for number, name in enumerate(basis)
        }
    )
