"""How well a score orders tokens like a label: over the whole range, and where a cut falls. Knows no model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas


def agreement(scores: Any, label: Any, share: float) -> tuple[float, float]:
    """Spearman's rank correlation of ``scores`` (T,) with ``label`` (T,), and the recall of the label's best tokens.

    Parameters
    ----------
    share
        Which part of the tokens counts as best, in (0, 1): recall is the part of the label's best that is among the
        score's best; a random score has correlation 0 and recall ``share``.

    Raises
    ------
    ValueError
        For arrays of different lengths, or a share outside (0, 1).
    """
    scores, label = np.asarray(scores, dtype=np.float64), np.asarray(label, dtype=np.float64)
    if scores.shape != label.shape or scores.ndim != 1:
        raise ValueError(f"scores of shape {scores.shape} and label of {label.shape}: give one number a token in both.")
    if not 0 < share < 1:
        raise ValueError(f"share={share} is not in (0, 1): name the part of the tokens that counts as best.")
    count = max(1, int(share * len(label)))
    found = np.intersect1d(np.argsort(label)[-count:], np.argsort(scores)[-count:])
    correlation = pandas.Series(scores).corr(pandas.Series(label), method="spearman")
    return float(correlation), len(found) / count
