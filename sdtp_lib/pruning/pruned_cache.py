"""What a pruned cache remembers, and how it answers transformers' questions about its length.

After a pruned prefill the layers of a cache differ in length, while transformers asks one layer and makes one mask for
all of one kind. So the cache object gets a subclass of its own class for the rest of its life: inside a
``with token_pruning(...)`` it answers with the unpruned length, so that transformers makes the mask of the unpruned
model, of which each layer is then handed its own columns (`continuation`). Outside it refuses what would be computed
wrongly. The record travels with copies, with rows that are reordered, and through ``torch.save``.

Axes: B rows, C columns seen (prompt tokens, padding included, and all tokens added later), K kept tokens.

Example: a prompt of 10 tokens, of which 6 stay before layer 4, then 2 decoded tokens. Layers 0 to 3 hold 12 keys; layer
4 and later hold 8, and their record says ``kept = [0, 1, 4, 7, 8, 9]``: the columns, among the first 10, of their first
6 keys; what follows are columns 10 and 11.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from sdtp_lib.architectures.caches import tokens_seen
from sdtp_lib.config import PruningNotSupported


@dataclass
class CacheRecord:
    """Which columns each layer of a pruned cache holds.

    Attributes
    ----------
    columns
        C at the time of the record, padding included.
    rows
        B.
    kept
        One entry per layer: columns (B, K) whose keys it holds, ascending, -1 for padding; None where it holds all.
    padded
        One entry per layer: whether ``kept`` has padding.
    any_padding
        Whether any row had padding at all.
    held
        Keys that each layer held right after the prefill; for layer 0 C, as it answers itself.
    compressed
        Whether a KV-cache compression (kvpress, say) ran inside the attention layers, so that layers hold fewer keys
        than the engine handed them, and which is not known.
    compact
        Whether kept tokens were renumbered.
    backend
        The attention backend that filled the cache.
    answers
        The first layer with keys, whose length transformers takes for that of layer 0.
    """

    columns: int
    rows: int
    kept: list[torch.Tensor | None]
    padded: list[bool]
    any_padding: bool
    held: list[int]
    compressed: bool
    compact: bool
    backend: str
    answers: int = 0

    def select_rows(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``, in that order, as the cache's own tensors do."""
        self.rows = len(indices)
        moved: dict[int, torch.Tensor] = {}
        for layer, kept in enumerate(self.kept):
            if kept is not None and kept.shape[0] > 1:
                # Layers between two cuts share one tensor, and go on sharing it.
                self.kept[layer] = moved.setdefault(id(kept), kept[indices.to(kept.device)])


def remembered(cache: Any) -> CacheRecord | None:
    """The record of the pruned prefill that filled ``cache``, or None."""
    return cache.record if isinstance(cache, PrunedCache) else None


def remember(cache: Any, record: CacheRecord) -> None:
    """Attach ``record`` to the cache object."""
    if not isinstance(cache, PrunedCache):
        cache.__class__ = _pruned_class(type(cache))
    cache.record, cache.inside = record, False


def _pruned_class(base: type) -> type:
    if base not in _PRUNED_CLASSES:
        _PRUNED_CLASSES[base] = type(f"Pruned{base.__name__}", (PrunedCache, base), {})
    return _PRUNED_CLASSES[base]


def _rebuilt(base: type) -> Any:
    cls = _pruned_class(base)
    return cls.__new__(cls)


_PRUNED_CLASSES: dict[type, type] = {}


class PrunedCache:
    """What a transformers cache is besides its own class once a pruned prefill has filled it."""

    record: CacheRecord
    inside: bool  # whether a `with token_pruning` is running a forward on it

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """As the cache's own; layer 0, which transformers asks how much was seen, counts what it gave up, too."""
        length = super().get_seq_length(layer_idx)
        first = self.record.kept[self.record.answers]
        return length if layer_idx or first is None else length + self.record.columns - first.shape[1]

    def __reduce__(self) -> tuple:
        # The class is made at run time, so pickle is told what to make it from.
        return _rebuilt, (type(self).__mro__[2],), {**self.__dict__, "inside": False}

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Where the next token stands, in every layer: after all tokens seen."""
        return tokens_seen(self)

    def get_mask_sizes(self, query: Any, layer_idx: int) -> tuple[int, int]:
        """(keys, offset) of the unpruned model, in every layer. ``query`` is a count, or cache positions (< 5.4)."""
        new_tokens = int(query.shape[0]) if torch.is_tensor(query) else int(query)
        if not self.inside:
            self._refuse_outside(new_tokens)
        return tokens_seen(self) + new_tokens, 0

    def _refuse_outside(self, new_tokens: int) -> None:
        record = self.record
        needs_no_mask = record.backend != "eager" and not (record.any_padding or any(record.padded) or record.compact)
        if new_tokens == 1 and needs_no_mask and not any(getattr(layer, "is_sliding", False) for layer in self.layers):
            return
        raise PruningNotSupported(
            "past_key_values was filled by a pruned prefill, and its layers differ in length: run "
            f"the {new_tokens} token(s) that follow inside `with token_pruning(...)` as well."
        )

    def crop(self, count: int) -> None:
        """As the cache's own, but never below the prompt."""
        seen, record = tokens_seen(self), self.record
        # Before transformers 5.7 or so a crop named the length to keep, and 0 emptied the cache.
        removes = "tokens_to_remove" in next(iter(inspect.signature(self.layers[0].crop).parameters), "")
        removed = -count if count < 0 or (count == 0 and removes) else max(seen - count, 0)
        if removed > seen - record.columns:
            raise PruningNotSupported(
                f"crop({count}) would remove {removed} tokens, but only {seen - record.columns} were added after the "
                "pruned prefill, and a pruned prompt cannot be shortened: prefill the shorter prompt anew."
            )
        super().crop(-removed if removed else (0 if removes else seen))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """As the cache's own; the record's rows go along."""
        super().reorder_cache(beam_idx)
        self.record.select_rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """As the cache's own; the record's rows go along."""
        super().batch_select_indices(indices)
        self.record.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As the cache's own; the record's rows go along."""
        super().batch_repeat_interleave(repeats)
        self.record.select_rows(torch.arange(self.record.rows).repeat_interleave(repeats))

    def reset(self) -> None:
        """Empty, and an ordinary cache again (some releases only fill the tensors with zeros: then as it was)."""
        super().reset()
        if tokens_seen(self) == 0:
            self.__class__ = type(self).__mro__[2]
            del self.record, self.inside
