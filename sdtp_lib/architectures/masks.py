"""Rows and columns of the attention mask that transformers made, in the form of each attention backend.

What a mask holds (windows, alibi, packed sequences, a model's own pattern) is not known here and need not be: a cut
layer gets the entries of its own queries and keys, unchanged. Part of the door to transformers' internals.

Axes: B rows, H heads, Q queries, N keys of the unpruned model; q queries and n keys of one layer.

Example: 6 tokens of which 0, 2, 5 stay. ``queries = keys = [[0, 2, 5]]``, and a causal 6 x 6 mask becomes::

    [[1, 0, 0],      token 0 sees 0
     [1, 1, 0],      token 2 sees 0 and 2
     [1, 1, 1]]      token 5 sees all three
"""

from __future__ import annotations

from typing import Any

import torch

from sdtp_lib.architectures.row_masks import RowMask
from sdtp_lib.config import PruningNotSupported


def cut_mask(
    mask: Any,
    queries: torch.Tensor | None,
    keys: torch.Tensor,
    padded: bool,
    *,
    query_count: int,
    backend: str,
    dtype: torch.dtype,
) -> Any:
    """The part of ``mask`` that one layer needs.

    Parameters
    ----------
    mask
        What transformers made for the unpruned layer: None (the backend is then causal by itself); booleans (True:
        seen) or numbers to add, (B or 1, H or 1, Q or 1, N); (B, N) for flash attention; a ``BlockMask`` for flex; a
        `RowMask`.
    queries : Tensor (B or 1, q) or None
        Rows that remain, -1 for padding, None for all of them. They count from the first new token.
    keys : Tensor (B or 1, n)
        Columns that the layer holds, ascending, -1 for padding. The layer's queries are the last q of them.
    padded
        Whether ``queries`` or ``keys`` have padding (known on the host, so that no device is asked).
    query_count
        q, the queries of this layer.
    backend, dtype
        The attention backend, and the type in which eager attention adds a mask: read where ``mask`` is None.

    Raises
    ------
    PruningNotSupported
        For a mask of another form.
    """
    if mask is None:
        return _mask_where_none_was(query_count, keys, backend, dtype) if padded else None
    if isinstance(mask, RowMask):
        return mask.cut(queries, keys)
    if torch.is_tensor(mask) and mask.dim() == 2:
        cut = _columns(mask, keys)
        return cut * (keys >= 0).to(cut.dtype) if padded else cut
    if torch.is_tensor(mask) and mask.dim() == 4:
        return _cut_tensor(mask, queries, keys, padded)
    if hasattr(mask, "mask_mod"):
        return _cut_block_mask(mask, queries, keys)
    found = tuple(mask.shape) if torch.is_tensor(mask) else type(mask).__name__
    raise PruningNotSupported(
        f"attention_mask {found}: the rows and columns of such a mask are not known, so it cannot be cut: load the "
        "model with attn_implementation='sdpa'."
    )


def last_rows(mask: Any, count: int) -> torch.Tensor | RowMask | None:
    """The rows of the last ``count`` queries of a 4-D mask, a `RowMask` itself; None where it has another form."""
    if isinstance(mask, RowMask):
        return mask
    return mask[:, :, -count:] if torch.is_tensor(mask) and mask.dim() == 4 else None


def _cut_tensor(mask: torch.Tensor, queries: torch.Tensor | None, keys: torch.Tensor, padded: bool) -> torch.Tensor:
    keys = keys.to(mask.device)
    columns = keys.clamp_min(0)
    if queries is not None and mask.shape[2] > 1:
        rows = queries.to(mask.device).clamp_min(0)
        if max(mask.shape[0], rows.shape[0], columns.shape[0]) == 1:
            mask = mask.index_select(2, rows[0]).index_select(3, columns[0])
        else:
            mask = _pick(mask, rows, columns)
    elif columns.shape[0] == 1:
        mask = mask.index_select(3, columns[0])
    else:
        mask = mask.expand(columns.shape[0], -1, -1, -1)
        mask = mask.gather(3, columns[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1))
    return _without_padding(mask, keys) if padded else mask


def _pick(mask: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    batch = max(mask.shape[0], rows.shape[0], columns.shape[0])
    which = torch.arange(batch, device=mask.device)[:, None, None]
    # (B, 1, 1), (B, q, 1), (B, 1, n) broadcast to (B, q, n). Indices on both sides of a slice put the sliced axis last:
    # (B, q, n, H).
    picked = mask.expand(batch, -1, -1, -1)[which, :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


def _without_padding(mask: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Padding is seen by nobody but itself: an empty row would be NaN, and NaN times a zero weight is still NaN.

    Example: two rows keep 3 and 2 tokens, ``keys = [[0, 2, 5], [-1, 3, 5]]``. The mask of row 1 becomes::

        [[1, 0, 0],      padding sees itself only
         [0, 1, 0],      token 3 sees itself
         [0, 1, 1]]      token 5 sees 3 and itself
    """
    q, n = mask.shape[2], mask.shape[3]
    valid = keys >= 0
    seen = valid[:, None, None, :]
    own = torch.eye(n, dtype=torch.bool, device=mask.device)[n - q :][None, None] & ~valid[:, None, n - q :, None]
    if mask.dtype == torch.bool:
        return (mask & seen) | own
    return mask.masked_fill(~seen, torch.finfo(mask.dtype).min).masked_fill(own, 0)


def _mask_where_none_was(q: int, keys: torch.Tensor, backend: str, dtype: torch.dtype) -> Any:
    """A causal mask for rows of one length that kept different numbers of tokens, so that some are padded now."""
    if backend.startswith("flash_attention"):
        return (keys >= 0).long()
    order = torch.arange(keys.shape[1], device=keys.device)
    causal = order[None, :] <= order[-q:, None]
    allowed = _without_padding(causal.expand(keys.shape[0], 1, -1, -1), keys)
    if backend == "flex_attention":
        return _block_mask(lambda row, _head, query, key: allowed[row, 0, query, key], keys.shape[0], q, keys)
    if backend == "sdpa":
        return allowed
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)


def _columns(mask: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    columns = keys.clamp_min(0).to(mask.device)
    rows = max(mask.shape[0], columns.shape[0])
    return mask.expand(rows, -1).gather(1, columns.expand(rows, -1))


def _cut_block_mask(mask: Any, queries: torch.Tensor | None, keys: torch.Tensor) -> Any:
    whole = mask.mask_mod
    q = mask.shape[-2] if queries is None else queries.shape[1]
    columns, valid = keys.clamp_min(0), keys >= 0
    rows = None if queries is None else queries.clamp_min(0)

    # A flex mask is a function of indices. Asked about query 2 and key 1 of kept tokens [0, 2, 5], it asks the model's
    # own about query 5 and key 2.
    def mask_mod(row: Any, head: Any, query: Any, key: Any) -> Any:
        # A tensor also where all rows share one list: torch 2.7 cannot map over an index that mixes both kinds.
        this = row if keys.shape[0] > 1 else row * 0
        original = query if rows is None else rows[this, query]
        own = ~valid[this, key] & (key == query + keys.shape[1] - q)
        return (whole(row, head, original, columns[this, key]) & valid[this, key]) | own

    return _block_mask(mask_mod, mask.shape[0], q, keys)


def _block_mask(mask_mod: Any, rows: int, queries: int, keys: torch.Tensor) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(mask_mod, rows, None, queries, keys.shape[1], device=keys.device)
