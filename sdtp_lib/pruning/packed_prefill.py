"""A prefill of rows of different length under sdpa: layers run on the tokens of all rows, and on no padding.

What is kept is decided as in any other `Prefill`; only what layers are handed differs: hidden states (1, N, D) of all
rows behind one another, and a `RowMask` by which attention goes row by row, so that no mask of all tokens x all tokens
exists. Scorers, the cache and the model's output see rows, padded on the left, as ever. Knows no hooks.

Axes: B rows, T new columns, K kept columns, N tokens of all rows, D hidden size.

Example: rows of 10 and 4 tokens. Layers get (1, 14, D) instead of (2, 10, D). Before layer 4 a scorer sees (2, 10, D);
6 and 3 tokens stay, and layers from there on get (1, 9, D). The last layer's output is spread out to (2, 6, D).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sdtp_lib.architectures.caches import cache_of, is_cache
from sdtp_lib.architectures.row_attention import MasksMade, RowsCache, as_usual, pack, unpack
from sdtp_lib.architectures.row_masks import RowMask
from sdtp_lib.pruning.earlier_layers import LAST_TOKENS
from sdtp_lib.pruning.prefill import Prefill

_TABLES = ("position_embeddings", "position_ids")


class PackedPrefill(Prefill):
    """A `Prefill` whose layers run on packed rows, unless the model's masks turn out to say more than a `RowMask`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.masks = MasksMade()  # of this forward, all known when its first layer is reached
        self.packs = False
        self._usual: dict[RowMask, Any] = {}

    def layer_arguments(self, index: int, layer: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        """As in `Prefill`, on packed rows."""
        if index == 0:
            self.packs = self._can_pack(arguments)
        if not self.packs:
            return super().layer_arguments(index, layer, self._with_usual_mask(arguments))
        self.cache = cache_of(arguments)
        if index == 0:
            arguments = {**arguments, "hidden_states": pack(arguments["hidden_states"], self.left)}
        given = self._shortened(index, arguments)
        if index in self.stages:
            hidden = self.cut_tokens(index, layer, given)
            if hidden is not None:
                given = self._shortened(index, {**arguments, "hidden_states": pack(hidden, self.left)})
        self._keep_for_later(index, given)
        self._look_far(index, layer, given)
        return {name: self._packed(name, value) for name, value in given.items()}

    def _last_by_rows(self, values: torch.Tensor) -> torch.Tensor:
        return self._by_rows(values, LAST_TOKENS) if self.packs else super()._last_by_rows(values)

    def after_last_layer(self, output: Any) -> Any:
        """The last layer's output, spread out to rows again."""
        if isinstance(output, tuple):
            return (self._by_rows(output[0]), *output[1:])
        return self._by_rows(output)

    def _by_rows(self, packed: torch.Tensor, last: int | None = None) -> torch.Tensor:
        """(B, K, ...) out of (1, N, ...), or the ``last`` so many columns of it."""
        if not self.packs:
            return packed
        columns = self.positions.shape[1]
        return unpack(packed, self.left, columns if last is None else min(last, columns))

    def _packed(self, name: str, value: Any) -> Any:
        if name in _TABLES and isinstance(value, (tuple, list)):
            return type(value)(self._packed(name, table) for table in value)
        if is_cache(value):
            return RowsCache(value, self.left, self.positions.shape[1])
        if not isinstance(value, RowMask) and not (name in _TABLES and torch.is_tensor(value)):
            return value
        # Layers share tables and masks: each is packed once per stage. Keep a reference: a freed id could be reused.
        if (id(value), "packed") not in self._cut:
            packed = value.packed(self.left) if isinstance(value, RowMask) else pack(value, self.left)
            self._cut[id(value), "packed"] = (value, packed)
        return self._cut[id(value), "packed"][1]

    def _can_pack(self, arguments: dict[str, Any]) -> bool:
        tables = [arguments[name] for name in _TABLES if arguments.get(name) is not None]
        tables = [table for each in tables for table in (each if isinstance(each, (tuple, list)) else (each,))]
        shapes = [table.shape[:2] if torch.is_tensor(table) else None for table in tables]
        rows = ((1, self.columns), (len(self.lengths), self.columns))
        masks = not self.masks.others and isinstance(arguments.get("attention_mask"), RowMask)
        return masks and all(shape in rows for shape in shapes)

    def _with_usual_mask(self, arguments: dict[str, Any]) -> dict[str, Any]:
        mask = arguments.get("attention_mask")
        if not isinstance(mask, RowMask):
            return arguments
        if mask not in self._usual:  # masks are equal only to themselves
            self._usual[mask] = as_usual(mask)
        return {**arguments, "attention_mask": self._usual[mask]}
