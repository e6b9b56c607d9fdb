"""A KV cache cut after the prefill, each layer to its own budget, as SnapKV, H2O and FastKV do.

Prefill time stays as it is; decode reads fewer keys. Scores are handed in; hooks are not known here. Which columns a
layer still holds goes into the cache's record, so that later turns get the right masks.

Axes: B rows, N tokens of a layer, G key-value heads, K kept.

Example: 10 tokens, a budget of half, the last 2 always: layer 3 holds 10 keys, of which the last 2 and the 3 best of
the other 8 stay; with scores per key-value head each head keeps 3 of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sdtp_lib.config import PruningNotSupported
from sdtp_lib.pruning.pruned_cache import CacheRecord
from sdtp_lib.pruning.selection import gather_tokens, select_positions
from sdtp_lib.pruning.stage import Scorer


@dataclass(frozen=True)
class KVBudget:
    """How many keys and values each layer keeps, and by which scores.

    Attributes
    ----------
    keep
        ``keep(tokens, layer_index, prompt_tokens)``: how many of the ``tokens`` that a layer holds stay.
    scorer
        Like a stage's scorer, asked for each layer once it has run; it may also return scores (B, G, N), by which each
        key-value head keeps tokens of its own (batch without padding, no sliding windows; else their mean counts).
    sink_tokens, last_tokens
        The first and the last tokens that always stay.
    """

    keep: Callable[[int, int, int], int]
    scorer: Scorer
    sink_tokens: int = 0
    last_tokens: int = 1

    def count(self, tokens: int, layer_index: int, prompt_tokens: int) -> int:
        """How many of ``tokens`` stay in layer ``layer_index``."""
        least = min(tokens, self.sink_tokens + self.last_tokens)
        return max(1, min(tokens, max(least, self.keep(tokens, layer_index, prompt_tokens))))

    def choose(self, scores: torch.Tensor, tokens: Sequence[int], kept: Sequence[int], by_head: bool) -> torch.Tensor:
        """Columns (B, K) to keep, or (B, G, K) ``by_head``, from scores (B, N) or (B, G, N); -1 for padding."""
        local = [min(count, self.last_tokens) for count in tokens]
        if scores.dim() == 2 or not by_head:
            scores = scores if scores.dim() == 2 else scores.mean(dim=1)
            return select_positions(scores, tokens, kept, self.sink_tokens, local)
        # Each key-value head chooses as a row of its own: scores (B * G, N), columns (B * G, K) -> (B, G, K).
        heads = scores.shape[1]
        spread = [[count for count in each for _ in range(heads)] for each in (tokens, kept, local)]
        flat = select_positions(scores.flatten(0, 1), spread[0], spread[1], self.sink_tokens, spread[2])
        return flat.unflatten(0, (len(tokens), heads))


def cut_cache(cache: Any, record: CacheRecord, chosen: dict[int, torch.Tensor]) -> None:
    """Cut the keys and values of each layer to ``chosen`` columns of what it holds; the record knows.

    Raises
    ------
    PruningNotSupported
        For a cache whose tensors are not at hand.
    """
    for index, columns in chosen.items():
        layer = cache.layers[index]
        if not torch.is_tensor(getattr(layer, "keys", None)) or getattr(layer, "_quantized_keys", None) is not None:
            raise PruningNotSupported(
                f"a KV budget cuts keys and values, but layer {index} of the cache ({type(layer).__name__}) does not "
                "hold them as tensors: use a dynamic cache (cache_implementation='dynamic', or none)."
            )
        columns = columns.to(layer.keys.device)
        if columns.dim() == 2:
            layer.keys, layer.values = (gather_tokens(held, columns, dim=2) for held in (layer.keys, layer.values))
            before = record.kept[index]
            kept = columns if before is None else gather_tokens(before.to(columns.device), columns)
            record.kept[index] = kept.masked_fill(columns < 0, -1)
            record.padded[index] = record.any_padding
        else:
            if columns.shape[1] != layer.keys.shape[1]:
                raise ValueError(
                    f"the KV budget's scores have {columns.shape[1]} heads at layer {index}, the cache "
                    f"{layer.keys.shape[1]}: give one score per key-value head, or one per token."
                )
            layer.keys, layer.values = (
                held.gather(2, columns[..., None].expand(-1, -1, -1, held.shape[-1]))
                for held in (layer.keys, layer.values)
            )
            # Heads keep different tokens, so no list of columns is right for all. It is read for masks only, and every
            # later token sees all that is kept, as it sees column 0: so column 0 stands for each of them.
            record.kept[index] = torch.zeros_like(columns[:1, 0])
        if index:
            record.held[index] = columns.shape[-1]
