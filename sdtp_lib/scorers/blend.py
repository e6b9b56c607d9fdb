"""Scores made comparable: standardised, smoothed over neighbours, and mixed at a stage.

A learned score finds the tokens that an answer far back needs, but it is noisy from token to token. Attention of the
last tokens and recency do better on running text. `Blend` is a weighted sum of the three.
Axes: B batch, N kept tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sdtp_lib.checked import count_of_tokens, neighbours, real_number, weight


@dataclass(frozen=True)
class Blend:
    """Weights of the parts of a score, each standardised over the kept tokens of a row first.

    Attributes
    ----------
    learned, attention, recency
        Weights of the pruner's score, of the logarithm of the attention paid by the last ``window`` tokens one layer
        earlier, and of the position. A weight of 0 leaves the part out and costs nothing.
    floor
        Where the learned score is cut off from below, in standard deviations above its mean: under it all tokens count
        alike, and the other parts decide their order. None: no cut-off.
    smoothing
        Neighbours (odd) that the learned score is averaged over: an answer is a span, not a token.
    window, kernel
        Of the attention: query tokens, and neighbours of which the strongest counts (the maximum, as in SnapKV's
        experiments, arXiv 2404.14469; the average is its code's default).
    """

    learned: float = 1.0
    attention: float = 0.0
    recency: float = 0.0
    floor: float | None = None
    smoothing: int = 1
    window: int = 16
    kernel: int = 7

    def __post_init__(self) -> None:
        checks = dict.fromkeys(("learned", "attention", "recency"), weight)
        checks |= {"smoothing": neighbours, "kernel": neighbours, "window": count_of_tokens}
        if self.floor is not None:
            checks["floor"] = real_number
        for field, check in checks.items():
            object.__setattr__(self, field, check(field, getattr(self, field)))
        if not (self.learned or self.attention or self.recency):
            raise ValueError("learned, attention and recency are all 0: give at least one a weight.")

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Blend:
        """The blend of these fields; an unknown one is a ``ValueError`` that names it."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(fields) - set(known)):
            raise ValueError(f"blend has unknown fields {unknown}: known are {', '.join(known)}.")
        return cls(**fields)

    def __call__(self, learned: Tensor, stage: Any) -> Tensor:
        """The mixed score (B, N), float32, of a `sdtp_lib.pruning.stage.Stage` from the pruner's score (B, N) there."""
        paid = stage.attention_just_paid(self.window).sum(dim=2) if self.attention else None
        return self.mixed(learned, stage.padding_mask, stage.positions, paid)

    def mixed(self, learned: Tensor, valid: Tensor | None, positions: Tensor, paid: Tensor | None) -> Tensor:
        """The same, differentiable in ``learned``; ``paid`` (B, H, N) is attention summed over the query tokens.

        ``valid`` (B, N) says which tokens are real; None: all.
        """
        parts = []
        if self.learned:
            standing_out = standardised(average_of_neighbours(learned.float(), valid, self.smoothing), valid)
            if self.floor is not None:
                standing_out = (standing_out - self.floor).clamp_min(0)
            parts.append(self.learned * standing_out)
        if self.attention:
            strongest = strongest_neighbour(paid, self.kernel).mean(dim=1)
            parts.append(self.attention * standardised((strongest + 1e-8).log(), valid))
        if self.recency:
            parts.append(self.recency * standardised(positions.float(), valid))
        return functools.reduce(torch.add, parts)

    def flops_per_token(self, hidden_size: int) -> float:
        """Floating-point operations per token and stage that the parts add: the queries' products with cached keys."""
        return 2.0 * self.window * hidden_size if self.attention else 0.0


def standardised(scores: Tensor, valid: Tensor | None) -> Tensor:
    """Scores (B, N) minus their mean, over their deviation, both over the row's ``valid`` tokens; 0 at padding.

    ``valid`` (B, N); None: all. At least float32. Equal scores give 0, with a gradient no larger than for scores of
    deviation 1.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if valid is None:
        centred = scores - scores.mean(dim=1, keepdim=True)
        variance = centred.square().mean(dim=1, keepdim=True)
    else:
        scores, real = scores.masked_fill(~valid, 0), valid.to(scores.dtype)
        count = real.sum(dim=1, keepdim=True).clamp_min(1)
        centred = (scores - scores.sum(dim=1, keepdim=True) / count) * real
        variance = centred.square().sum(dim=1, keepdim=True) / count
    # Replaced before the root: the root's gradient at 0 is infinite, and times 0 it is NaN.
    return centred / variance.masked_fill(variance <= 1e-24, 1).sqrt()


def average_of_neighbours(values: Tensor, valid: Tensor | None, kernel: int) -> Tensor:
    """Mean of (B, N) or (B, A, N) over the ``kernel`` tokens around each that are ``valid`` (B, N); None: all.

    Equal values have exactly equal means, so that ties stay ties.
    """
    if kernel == 1:
        return values
    rows = values if values.dim() == 3 else values[:, None]
    if valid is None:
        # Of 7 tokens and a kernel of 5: 2 on either side, but 0, 1, 2, 2, 2, 2, 2 are left of a token.
        left = torch.arange(rows.shape[-1], dtype=rows.dtype, device=rows.device).clamp_max(kernel // 2)
        counts = left + left.flip(0) + 1
    else:
        real = valid[:, None]
        rows = rows.masked_fill(~real, 0)
        counts = _sums_of_neighbours(real.to(rows.dtype), kernel).clamp_min(1)
    return (_sums_of_neighbours(rows, kernel) / counts).view_as(values)


def _sums_of_neighbours(values: Tensor, kernel: int) -> Tensor:
    """Sums of (B, A, N) over the ``kernel`` tokens around each, by doubling: of 65 the 64 first and the last.

    Sums of 2, 4, 8, ... neighbours are each two of the one before, so 65 neighbours cost 7 additions, not 65.
    """
    tokens = values.shape[-1]
    power, size = functional.pad(values, (kernel // 2, kernel // 2)), 1
    total, first = None, 0
    while True:
        if kernel & size:
            part = power[..., first : first + tokens]
            total, first = (part if total is None else total + part), first + size
        if 2 * size > kernel:
            return total
        power, size = power[..., :-size] + power[..., size:], 2 * size


def strongest_neighbour(values: Tensor, kernel: int) -> Tensor:
    """Maximum (B, H, N) over the ``kernel`` tokens around each."""
    return values if kernel == 1 else functional.max_pool1d(values, kernel, stride=1, padding=kernel // 2)
