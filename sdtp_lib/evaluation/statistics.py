"""Figures from lists of numbers: perplexity, paired differences with their interval, and how well a score orders tokens
like a label, over the whole range and where a cut falls. Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


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
        raise ValueError(f"scores are {scores.shape}, the label is {label.shape}: give one number per token in both.")
    if not 0 < share < 1:
        raise ValueError(f"share={share} is not in (0, 1): name the part of the tokens that counts as best.")
    count = max(1, int(share * len(label)))
    found = np.intersect1d(np.argsort(label)[-count:], np.argsort(scores)[-count:])
    return _correlation(_ranks(scores), _ranks(label)), len(found) / count


def _ranks(values: np.ndarray) -> np.ndarray:
    """Rank of each value, 1 for the smallest; equal values share the mean of their ranks."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's; nan where one of them is constant, so that no order can be compared."""
    one, other = one - one.mean(), other - other.mean()
    norm = np.sqrt((one**2).sum() * (other**2).sum())
    return float((one * other).sum() / norm) if norm else float("nan")


def perplexity(losses: Sequence[float]) -> float:
    """exp of the mean of per-token losses in nats (of items of equal length)."""
    return math.exp(float(np.mean(losses)))


def perplexity_growth(nats: float) -> float:
    """By how many percent perplexity is higher when the mean loss is higher by ``nats`` per token."""
    return 100 * math.expm1(nats)


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], seed: int = 0, *, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of ``a - b`` over pairs, and its percentile bootstrap interval.

    Raises
    ------
    ValueError
        If the lists differ in length or are empty.
    """
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"paired values of length {len(a)} and {len(b)}: need as many of each, at least one.")
    differences = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    draws = np.random.default_rng(seed).integers(0, len(differences), size=(resamples, len(differences)))
    low, high = np.quantile(differences[draws].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(differences.mean()), float(low), float(high)


def stratified_bootstrap(
    groups: Sequence[Sequence[float]], seed: int = 0, *, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of the groups' means, each group weighing alike, and its interval: values are resampled within groups.

    Raises
    ------
    ValueError
        If there is no group, or one is empty.
    """
    if not groups or not all(len(values) for values in groups):
        raise ValueError(f"groups of {[len(values) for values in groups]} values: need at least one value in each.")
    random = np.random.default_rng(seed)  # one for all: groups are drawn independently
    arrays = [np.asarray(values, dtype=float) for values in groups]
    draws = [values[random.integers(0, len(values), size=(resamples, len(values)))].mean(axis=1) for values in arrays]
    low, high = np.quantile(np.mean(draws, axis=0), [(1 - level) / 2, (1 + level) / 2])
    return float(np.mean([values.mean() for values in arrays])), float(low), float(high)
