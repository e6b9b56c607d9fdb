"""Tokens that come after a pruned prefill: decode steps, a second turn, drafts of a caller.

Nothing is dropped here. Each layer's cache holds the tokens kept there, so layers differ in length while transformers
makes one mask for all of them, sized from layer 0. This module knows what each layer holds and rebuilds what is wrong.
The record of the prefill travels with the cache object, also when it is copied. Axes: B rows, K kept tokens, Q queries.
"""

from __future__ import annotations

import inspect
import types
from dataclasses import dataclass, field
from typing import Any

import torch

from sdtp_lib.architectures.caches import attended_keys, cached_tokens, tokens_seen
from sdtp_lib.architectures.layers import Architecture
from sdtp_lib.architectures.masks import backend_mask
from sdtp_lib.config import PruningNotSupported

_RECORD = "_sdtp_prefill"


@dataclass
class PrefillRecord:
    """What a pruned prefill left in a cache.

    Attributes
    ----------
    columns
        Width T of the prompt batch, padding included: what layer 0 holds.
    lengths
        Prompt tokens of each row.
    segments
        ``(first layer, kept positions (B, K), whether any is padding)``, ascending.
    plan
        Tokens kept, a list of L lists of B.
    compact
        Whether kept tokens were renumbered.
    held
        Tokens that each layer's cache held right after the prefill: those of ``plan``, or fewer where a KV-cache
        compression (kvpress, say) ran inside the attention layers.
    added_valid
        (B, tokens added since) booleans, only where some added token is padding.
    """

    columns: int
    lengths: list[int]
    segments: list[tuple[int, torch.Tensor, bool]]
    plan: list[list[int]]
    compact: bool
    held: list[int]
    added_valid: torch.Tensor | None = field(default=None)

    @property
    def compressed(self) -> bool:
        """Whether something else dropped cached keys after the engine had handed the layers theirs."""
        first = self.segments[0][0]
        uncut = [self.columns if layer < first else max(rows) for layer, rows in enumerate(self.plan)]
        return self.held != uncut

    def segment_at(self, layer_index: int) -> tuple[int, torch.Tensor, bool] | None:
        """The last cut at or before ``layer_index``."""
        return next((segment for segment in reversed(self.segments) if segment[0] <= layer_index), None)


def remember(cache: Any, record: PrefillRecord) -> None:
    """Attach ``record`` to the cache object, whose ``crop`` refuses from now on to go below the prompt."""
    setattr(cache, _RECORD, record)
    cache.crop = types.MethodType(_guarded_crop, cache)


def remembered(cache: Any) -> PrefillRecord | None:
    """The record of the pruned prefill that filled ``cache``, or None."""
    return getattr(cache, _RECORD, None)


def _guarded_crop(cache: Any, count: int) -> None:
    record, seen = remembered(cache), tokens_seen(cache)
    plain_crop = types.MethodType(type(cache).crop, cache)
    # Before transformers 5.7 or so a crop named the length to keep, and 0 emptied the cache.
    removes = "tokens_to_remove" in next(iter(inspect.signature(cache.layers[0].crop).parameters), "")
    removed = -count if count < 0 or (count == 0 and removes) else max(seen - count, 0)
    if record is not None and removed > seen - record.held[0]:
        raise PruningNotSupported(
            f"crop({count}) would remove {removed} tokens, but only {seen - record.held[0]} were added after the "
            "pruned prefill, and a pruned prompt cannot be shortened: prefill the shorter prompt anew."
        )
    plain_crop(-removed if removed else (0 if removes else seen))


class Continuation:
    """One forward on a cache that a pruned prefill filled."""

    def __init__(
        self, architecture: Architecture, record: PrefillRecord, cache: Any, seen: int, new_tokens: int, mask: Any
    ) -> None:
        self.architecture, self.record, self.cache = architecture, record, cache
        self.added, self.new_tokens = seen - record.held[0], new_tokens
        self._check_cache(seen)
        self._read_padding(mask)
        self._masks: dict[Any, Any] = {}
        self._tables: dict[int, Any] = {}
        self._added_positions: torch.Tensor | None = None

    def _check_cache(self, seen: int) -> None:
        # A decode step looks at the last layer only: it is run for every token.
        layers = range(len(self.record.held)) if self.new_tokens > 1 else [len(self.record.held) - 1]
        for index in layers:
            held, kept = cached_tokens(self.cache, index), self.record.held[index]
            if self.added < 0 or held != kept + self.added:
                raise PruningNotSupported(
                    f"past_key_values: layer {index} holds {held} tokens where {kept} kept ones and {self.added} later "
                    f"ones were expected (layer 0 holds {seen}): crop a pruned cache only by a negative number of "
                    "tokens, at most those added after prefill."
                )

    def _read_padding(self, mask: Any) -> None:
        record = self.record
        if record.added_valid is not None:
            record.added_valid = record.added_valid[:, : self.added]
        fresh = None
        if self.new_tokens > 1 and torch.is_tensor(mask):
            if mask.dim() != 2:
                raise PruningNotSupported(
                    f"attention_mask of shape {tuple(mask.shape)} on a pruned cache: give the 2-D mask (rows, tokens)."
                )
            last = mask[:, -self.new_tokens :].bool()
            fresh = None if bool(last.all()) else last
        if fresh is None and record.added_valid is None:
            return
        rows = len(record.lengths)
        device = record.segments[0][1].device
        known = record.added_valid
        known = torch.ones(rows, self.added, dtype=torch.bool) if known is None else known
        fresh = torch.ones(rows, self.new_tokens, dtype=torch.bool) if fresh is None else fresh
        record.added_valid = torch.cat([known.to(device), fresh.to(device)], dim=1)

    def layer_arguments(self, index: int, _layer: Any, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments that layer ``index`` gets instead of its own; None where its own are right."""
        segment = self.record.segment_at(index)
        if segment is None:
            return None
        start, positions, padded = segment
        padded = padded or self.record.added_valid is not None
        window = self.architecture.sliding_window(index)
        if window is not None and max(self.record.lengths) + self.added + self.new_tokens <= window:
            window = None
        alibi = arguments.get("alibi")
        plain = self.new_tokens == 1 and not padded and window is None and alibi is None and not self.record.compact
        if plain and arguments.get("attention_mask") is None:
            return None
        arguments = dict(arguments)
        if plain:
            arguments["attention_mask"] = None
            return arguments
        hidden = arguments["hidden_states"]
        if hidden.shape[0] != positions.shape[0] and positions.shape[0] != 1:
            raise PruningNotSupported(
                f"the cache was filled by {positions.shape[0]} rows and is continued by {hidden.shape[0]}: "
                "expand the prompt before the prefill (num_return_sequences, num_beams do)."
            )
        if self.record.compressed:
            positions = self._compressed_positions(index, padded, window, alibi, hidden)
        arguments["attention_mask"] = self._mask(index, start, positions, padded, window, hidden)
        if alibi is not None:
            arguments["alibi"] = self._alibi(start, positions, alibi)
        if self.record.compact:
            tables, ids = self._compact_tables(start, positions.shape[1], hidden)
            arguments["position_embeddings"], arguments["position_ids"] = tables, ids
        return arguments

    def _compressed_positions(
        self, index: int, padded: bool, window: int | None, alibi: Any, hidden: torch.Tensor
    ) -> torch.Tensor:
        """Stand-ins for the positions of keys that a KV-cache compression left: all real, all before what comes now."""
        if padded or window is not None or alibi is not None or self.record.compact:
            raise PruningNotSupported(
                "a KV-cache compression ran inside the pruned prefill, and which keys it kept is not known here: "
                "combine the two without padding, sliding windows, alibi and positions='compact'."
            )
        return torch.zeros(hidden.shape[0], self.record.held[index], dtype=torch.int64, device=hidden.device)

    def _all_added_positions(self, device: torch.device) -> torch.Tensor:
        """Positions (B, added + Q) of the tokens after the prompt, -1 for padding among them."""
        if self._added_positions is None:
            lengths = torch.tensor(self.record.lengths, device=device)[:, None]
            positions = lengths + torch.arange(self.added + self.new_tokens, device=device)[None]
            if self.record.added_valid is not None:
                positions = positions.masked_fill(~self.record.added_valid.to(device), -1)
            self._added_positions = positions
        return self._added_positions.to(device)

    def _mask(
        self, index: int, start: int, positions: torch.Tensor, padded: bool, window: int | None, hidden: torch.Tensor
    ) -> Any:
        keys = attended_keys(self.cache, index, cached_tokens(self.cache, index), self.new_tokens)
        if (start, window, keys) not in self._masks:
            later = self._all_added_positions(hidden.device)
            known = torch.cat([positions.to(hidden.device), later], dim=1)[:, -keys:]
            self._masks[start, window, keys] = backend_mask(
                self.architecture.backend, known[:, -self.new_tokens :], known,
                window=window, padded=padded, dtype=hidden.dtype,
            )  # fmt: skip
        return self._masks[start, window, keys]

    def _alibi(self, start: int, positions: torch.Tensor, alibi: torch.Tensor) -> torch.Tensor:
        """BLOOM's bias of the kept keys and of all later ones, out of the one made for the unpruned length."""
        if start not in self._tables:
            rows, columns = positions.shape[0], self.record.columns
            offsets = columns - torch.tensor(self.record.lengths, device=alibi.device)[:, None]
            kept = (positions.to(alibi.device) + offsets).clamp_min(0)
            later = torch.arange(columns, alibi.shape[-1], device=alibi.device).expand(rows, -1)
            by_row = alibi.reshape(rows, -1, alibi.shape[-1])
            wanted = torch.cat([kept, later], dim=1)[:, None].expand(-1, by_row.shape[1], -1)
            self._tables[start] = by_row.gather(2, wanted).reshape(alibi.shape[0], 1, -1)
        return self._tables[start]

    def _compact_tables(self, start: int, kept: int, hidden: torch.Tensor) -> tuple[Any, torch.Tensor]:
        if start not in self._tables:
            first = kept + self.added
            ids = torch.arange(first, first + self.new_tokens, device=hidden.device)[None]
            self._tables[start] = (self.architecture.rotary()(hidden, position_ids=ids), ids)
        return self._tables[start]
