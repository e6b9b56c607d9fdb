"""A forward that keeps what scorers at its stages may read of the layers before: last queries, masks, cached keys.

Knows no scorer and cuts nothing; `prefill` does both. Axes: B rows, N new tokens kept so far, w of the last of them, H
heads, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sdtp_lib.architectures.caches import cached_keys, cached_past, without_cache
from sdtp_lib.architectures.layers import Architecture
from sdtp_lib.architectures.masks import last_rows
from sdtp_lib.config import PruningNotSupported
from sdtp_lib.pruning.continuation import ForwardPass
from sdtp_lib.pruning.far_sight import FarSight
from sdtp_lib.pruning.stage import LAYERS_AT_HAND, LayerBefore

LAST_TOKENS = 128  # whose queries each layer keeps for scorers that read the attention of the last tokens in it


class EarlierLayers(ForwardPass):
    """What the layers that have run since the last cut hold for a scorer.

    Attributes
    ----------
    stages
        The layers before which scorers ask.
    positions : Tensor (B, N)
        Of the kept tokens, -1 at padding; ``padded``: whether there may be any.
    far
        The last `FarSight`, where other layers see a window.
    """

    positions: torch.Tensor
    padded: bool

    def __init__(
        self, architecture: Architecture, compact: bool, rows: int, columns: int, cache: Any, stages: tuple[int, ...]
    ) -> None:
        super().__init__(architecture, compact, rows, columns, cache)
        self.stages = stages
        self.last_queries: dict[int, torch.Tensor] = {}  # of the layers since the last cut
        self.last_masks: dict[int, Any] = {}
        self._to_keep: int | None = None  # the layer now running, if its queries are to be kept
        self.windowed, self.far = architecture.windowed_layers(), None
        self.near = self.windowed | architecture.state_layers

    def _keep_for_later(self, index: int, given: dict[str, Any]) -> None:
        self._to_keep = index if self._is_read_later(index) else None
        if self._to_keep is not None:
            self.last_masks[index] = last_rows(given.get("attention_mask"), LAST_TOKENS)

    def keep_queries(self, index: int, queries: torch.Tensor) -> None:
        """Keep the last of the queries (B, N, H * d) that layer ``index`` has projected, if it is the one running."""
        if index == self._to_keep:  # scorers ask layers for queries, too, before they run and after
            self.last_queries[index], self._to_keep = self._last_by_rows(queries), None

    def _last_by_rows(self, values: torch.Tensor) -> torch.Tensor:
        """(B, w, any) of the last tokens. A copy: a view would keep the whole tensor in memory."""
        return values[:, -LAST_TOKENS:].clone()

    def _look_far(self, index: int, layer: nn.Module, given: dict[str, Any]) -> None:
        if self.windowed and index not in self.near and any(index < stage for stage in self.stages):
            # For stages whose layers see a window. A copy: some families write into their hidden states.
            hidden = self._by_rows(given["hidden_states"]).clone()
            valid = (self.positions >= 0).to(hidden.device) if self.padded else None
            self.far = FarSight(index, layer, hidden, without_cache(given), valid, self._past(index))

    def _is_read_later(self, index: int) -> bool:
        return any(index < stage <= index + LAYERS_AT_HAND for stage in self.stages)

    def _layers_before(self, index: int, device: torch.device) -> dict[int, LayerBefore]:
        found = {}
        for earlier in range(max(0, index - LAYERS_AT_HAND), index):
            keys = cached_keys(self.cache, earlier, self._held_before(earlier) + self.positions.shape[1])
            # Neither across the devices of a device_map, nor from a window's cache, which holds the last keys only.
            whole = keys is not None and self.architecture.sliding_window(earlier) is None
            if whole and earlier in self.last_queries and keys.device == device:
                found[earlier] = LayerBefore(
                    self.architecture.layers[earlier], keys, self.last_queries[earlier], self.last_masks[earlier]
                )
        return found

    def _held_before(self, layer: int) -> int:
        """Keys that ``layer`` held before this prefill."""
        if self.record is None:
            return self.seen
        return self.record.held[layer] + self.seen - self.record.columns

    def _past(self, index: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not self.seen or index in self.architecture.state_layers:
            return None
        past = cached_past(self.cache, index)
        if past is None:
            raise PruningNotSupported(
                f"prune='every' on past_key_values={type(self.cache).__name__}, whose keys cannot be read, and scores "
                "need the attention that goes to them: use a dynamic cache."
            )
        return past

    def _by_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, N, D) as a scorer sees them."""
        return hidden
