"""AUC: how well a score separates two sets."""

from __future__ import annotations

from typing import Any

import numpy as np

from curvfast.errors import InputError


def auc(positives: Any, negatives: Any) -> float:
    """Return the area under the ROC curve: the probability that a positive outscores a negative.

    A tie counts one half, so equal scores give 0.5 and the order of either list plays no part
    (the Mann-Whitney statistic over the number of pairs).

    Args:
        positives: Scores, [n], of any float dtype.
        negatives: Scores, [m].

    Returns:
        In [0, 1].

    Raises:
        InputError: If either is empty or holds NaN.
    """
    high, low = (np.asarray(scores, dtype=np.float64).ravel() for scores in (positives, negatives))
    for name, scores in (("positives", high), ("negatives", low)):
        if not len(scores) or np.isnan(scores).any():
            raise InputError(
                f"{name} are {len(scores)} scores, some NaN or none at all: pass numbers"
            )
    low = np.sort(low)
    below, upto = np.searchsorted(low, high, "left"), np.searchsorted(low, high, "right")
    return float((below + upto).sum() / (2 * len(low) * len(high)))
