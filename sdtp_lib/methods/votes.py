"""From attention to scores: sums over queries, pooling over neighbours, blocks, and decisions that a scorer makes.

Pure functions of tensors; they know no model and no method. Axes: B rows, H heads, G key-value heads, w queries, N
tokens.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def votes(attention: torch.Tensor, kernel: int = 1) -> torch.Tensor:
    """(B, H, N): attention (B, H, w, N) summed over the w queries, averaged over ``kernel`` neighbours.

    The last w tokens are the queries themselves, which always stay: they neither vote for each other nor lend their
    share to neighbours (SnapKV, FastKV). At the ends missing neighbours count as 0, as in these papers' code.
    """
    window = attention.shape[2]
    before = attention[..., : attention.shape[-1] - window].sum(dim=2)
    if kernel > 1 and before.shape[-1]:
        before = functional.avg_pool1d(before, kernel, stride=1, padding=kernel // 2)
    return functional.pad(before, (0, window))


def by_group(scores: torch.Tensor, groups: int) -> torch.Tensor:
    """(B, G, N): scores (B, H, N) summed over the heads that share a key-value head."""
    return scores.unflatten(1, (groups, -1)).sum(dim=2)


def block_means(scores: torch.Tensor, valid: torch.Tensor, size: int) -> torch.Tensor:
    """(B, N): each token's block's mean; blocks of ``size`` from a row's first token on, the last may be shorter."""
    index = ((valid.cumsum(dim=1) - 1).clamp_min(0) // size).long()
    kept = torch.where(valid, scores, 0.0)
    sums = torch.zeros_like(kept).scatter_add(1, index, kept)
    counts = torch.zeros_like(kept).scatter_add(1, index, valid.to(kept.dtype))
    return (sums / counts.clamp_min(1)).gather(1, index)


def best_blocks(means: torch.Tensor, size: int, *, mass: float | None = None, count: int | None = None) -> torch.Tensor:
    """Booleans (1, N): the best whole blocks by ``means`` (1, N), ``count`` of them or up to a share of the sum.

    Blocks count once each, whatever their length. No value is read from the device.
    """
    each = means[0, ::size]
    order = each.argsort(descending=True, stable=True)
    if count is None:
        held = each.double()[order].cumsum(0)
        stays = torch.cat([torch.ones_like(held[:1], dtype=torch.bool), held[:-1] < mass * held[-1] * (1 - 1e-12)])
    else:
        stays = torch.arange(len(each), device=means.device) < count
    chosen = torch.zeros_like(stays).scatter(0, order, stays)
    return chosen.repeat_interleave(size)[: means.shape[1]][None]


def decided(stays: torch.Tensor) -> torch.Tensor:
    """Scores (1, N), 1 for each token that stays and 0 for the others; ``keep_mass=1.0`` keeps exactly the ones."""
    return stays.to(torch.float32)
