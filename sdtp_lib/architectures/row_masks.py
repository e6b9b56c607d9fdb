"""`RowMask`: the mask of rows of different length, described by columns, padding and a window instead of a tensor.

It takes the place of the (B, 1, T, T) booleans that transformers would make, and a layer that gets one attends to each
row by itself, without its padding (`row_attention`). Part of the door to transformers'
internals. Only plain causal attention and sliding windows can be described so; any other mask is made as usual.

Axes: B rows, C columns seen (cached ones included), Q queries and N keys of one layer, both in columns of C.

Example: rows of 5 and of 2 tokens, so C = 5. ``keys = queries = [[0, 1, 2, 3, 4]]`` and ``real = [[1, 1, 1, 1, 1],
[0, 0, 0, 1, 1]]``: row 0 is causal attention over five tokens, row 1 over its last two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

# Queries that are attended at once where a mask is needed (windows, prefixes): no more than so many rows of it exist.
BLOCK = 512


@dataclass(frozen=True, eq=False)
class RowMask:
    """Who sees whom in one layer, without a tensor of all queries x all keys.

    Attributes
    ----------
    queries : Tensor (B or 1, Q)
        Columns of the queries, -1 for padding.
    keys : Tensor (B or 1, N)
        Columns of the keys, ascending, -1 for padding.
    real : Tensor (B, C) of bool
        Which columns are tokens, not padding.
    window : int or None
        Columns that a query sees at most, its own included.
    arguments : dict
        What transformers was about to make its mask from.
    counts : list of int
        Queries of each row that are tokens: its last so many. Empty until the layer's inputs are packed.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    real: torch.Tensor
    window: int | None
    arguments: dict[str, Any] = field(default_factory=dict, repr=False)
    counts: Sequence[int] = ()
    _known: dict[Any, Any] = field(default_factory=dict, repr=False)

    def cut(self, queries: torch.Tensor | None, keys: torch.Tensor) -> RowMask:
        """The part for ``queries`` (B or 1, q), which count from the first new column, and ``keys`` (B or 1, n)."""
        new = self.queries
        if queries is not None:
            queries = queries.to(self.real.device)
            new = torch.where(queries < 0, queries, queries + int(self.real.shape[1] - self.queries.shape[1]))
        return replace(self, queries=new, keys=keys.to(self.real.device), _known={})

    def packed(self, counts: Sequence[int]) -> RowMask:
        """The same for queries whose padding was taken out."""
        return replace(self, counts=list(counts), _known={})

    def written_out(self, last: int, keys: int) -> torch.Tensor:
        """Booleans (B, 1, w, n) of the last ``last`` queries and ``keys`` keys: True where a query sees a key."""
        rows = len(self.real)
        query, key = self.queries[:, -last:], self.keys[:, -keys:]
        real = (key >= 0) & self.real.gather(1, key.clamp_min(0).expand(rows, -1))
        return self._seen(query[:, :, None], key[:, None, :]).expand(rows, -1, -1)[:, None] & real[:, None, None]

    def blocks(self, row: int, width: int) -> Iterator[tuple[slice, Any, torch.Tensor | None]]:
        """The queries of ``row`` block by block: which of them (counted without padding), their keys, their mask.

        Keys are a slice or indices of the layer's ``width`` keys. A mask (q, n) of True where a query sees a key; None
        for one block of all queries whose keys are the same tokens, with plain causal attention.
        """
        count = self.counts[row]
        columns, where = self._keys_of(row, width)
        if len(columns) == count and (self.window is None or self.real.shape[1] <= self.window):
            yield slice(0, count), where, None
            return
        queries = self._row(self.queries, row)[-count:]
        for start, stop, first, last in self._bounds(row, queries, columns):
            seen = self._seen(queries[start:stop, None], columns[None, first:last])
            some = slice(where.start + first, where.start + last) if isinstance(where, slice) else where[first:last]
            yield slice(start, stop), some, seen

    def _seen(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        seen = key <= query
        return seen if self.window is None else seen & (key > query - self.window)

    def _row(self, columns: torch.Tensor, row: int) -> torch.Tensor:
        return columns[row if columns.shape[0] > 1 else 0]

    def _keys_of(self, row: int, width: int) -> tuple[torch.Tensor, Any]:
        """Columns of a row's keys that are tokens, and where they are among the layer's ``width`` keys."""
        keys = self._row(self.keys, row)
        if keys.shape[0] == self.queries.shape[1]:  # nothing was cached before: keys are the queries' own
            count = self.counts[row]
            return keys[-count:], slice(width - count, width)
        if ("keys", row) not in self._known:  # asked once for all layers that share this mask
            places = ((keys >= 0) & self.real[row, keys.clamp_min(0)]).nonzero()[:, 0]
            self._known["keys", row] = keys[places], places
        return self._known["keys", row]

    def _bounds(self, row: int, queries: torch.Tensor, columns: torch.Tensor) -> list[tuple[int, int, int, int]]:
        """First and last query of each block, first and last key that any of them sees."""
        if ("bounds", row) not in self._known:
            starts = list(range(0, len(queries), BLOCK))
            stops = [min(start + BLOCK, len(queries)) for start in starts]
            lasts = torch.searchsorted(columns, queries[[stop - 1 for stop in stops]].contiguous(), right=True).tolist()
            firsts = [0] * len(starts)
            if self.window is not None:
                oldest = (queries[starts] - self.window + 1).contiguous()
                firsts = torch.searchsorted(columns, oldest).tolist()
            self._known["bounds", row] = list(zip(starts, stops, firsts, lasts, strict=True))
        return self._known["bounds", row]
