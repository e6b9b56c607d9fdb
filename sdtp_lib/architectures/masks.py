"""Attention masks over kept tokens, in the form that each attention backend reads.

A mask is never sliced from the one that transformers made for the full prompt: it is built afresh from positions,
which is the only thing that stays true after a cut. Part of the door to transformers' internals (`architectures`).
Axes: B rows, Q queries, N keys.
"""

from __future__ import annotations

from typing import Any

import torch

from sdtp_lib.config import PruningNotSupported


def position_mask(
    query_positions: torch.Tensor, key_positions: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """Who may look at whom: (B, 1, Q, N) booleans from original positions (B, Q) and (B, N), padding being -1.

    The queries are the last Q keys. A key is seen if it is real, not later than the query and, with a ``window``,
    fewer than ``window`` original positions back.
    """
    queries, keys = query_positions[:, None, :, None], key_positions[:, None, None, :]
    allowed = (keys >= 0) & (keys <= queries)
    if window is not None:
        allowed &= queries - keys < window
    # A padding query sees itself only: an empty row would be NaN, and NaN times a zero weight is still NaN.
    columns = torch.arange(key_positions.shape[1], device=key_positions.device)
    own = columns[None, :] == columns[-query_positions.shape[1] :, None]
    return allowed | (own[None, None] & (queries < 0))


def backend_mask(
    backend: str,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    *,
    window: int | None,
    padded: bool,
    dtype: torch.dtype,
) -> Any | None:
    """The mask for one layer in the form of ``backend``; None where the backend needs none.

    Parameters
    ----------
    backend
        One of `architectures.ATTENTION_BACKENDS`.
    query_positions, key_positions : Tensor (B, Q), (B, N)
        Original positions, -1 for padding; the queries are the last Q keys.
    window
        Sliding window in original positions where it matters, else None.
    padded
        Whether any key is padding (known on the host, so that no device is asked).
    dtype
        The attention scores' type (eager adds the mask to them).
    """
    queries, keys = query_positions.shape[1], key_positions.shape[1]
    if backend.startswith("flash_attention"):
        if window is not None:
            raise PruningNotSupported(
                f"attn_implementation={backend!r} counts a sliding window in kept tokens, not in original positions: "
                "load the model with attn_implementation='sdpa'."
            )
        return (key_positions >= 0).long() if padded else None
    if not padded and window is None and (queries == 1 or (backend == "sdpa" and queries == keys)):
        # One query sees every key. sdpa without a mask is causal, but only right when queries and keys are as many.
        return None
    if backend == "flex_attention":
        return _block_mask(query_positions, key_positions, window)
    allowed = position_mask(query_positions, key_positions, window)
    if backend == "sdpa":
        return allowed
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)


def _block_mask(query_positions: torch.Tensor, key_positions: torch.Tensor, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    allowed = position_mask(query_positions, key_positions, window)[:, 0]

    def mask_mod(batch: Any, _head: Any, query: Any, key: Any) -> Any:
        return allowed[batch, query, key]

    rows, queries, keys = allowed.shape
    return create_block_mask(mask_mod, rows, None, queries, keys, device=allowed.device)
