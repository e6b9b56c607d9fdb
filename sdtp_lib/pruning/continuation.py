"""One forward inside ``with token_pruning``, on whatever its cache holds: what each layer gets, shortened to its keys.

A forward is always the same thing: keys that are already in each layer's cache (none, a prefix, what earlier cuts
left), new tokens, and perhaps cuts among the new ones. Decode steps, a second turn and a caller's drafts are forwards
without cuts, served here; `prefill` adds the cuts. Neither knows hooks.

Axes: B rows, T new columns (padding included), K kept among them, Q queries of a layer, n keys that it attends to.

Example: 10 prompt tokens, of which layer 4 and later hold 0, 1, 4, 7, 8, 9, then 2 decoded tokens, and now a third. The
model makes a mask over 13 keys. Layers 0 to 3 get it as it is; layer 4 gets its columns 0, 1, 4, 7, 8, 9, 10, 11, 12.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sdtp_lib.architectures.caches import attended_keys, cached_tokens, tokens_seen
from sdtp_lib.architectures.layers import STATE_MASKS, Architecture
from sdtp_lib.architectures.masks import cut_mask
from sdtp_lib.config import PruningNotSupported
from sdtp_lib.pruning.pruned_cache import CacheRecord, remembered
from sdtp_lib.pruning.selection import gather_tokens


class ForwardPass:
    """One forward under way on ``cache``: layer inputs, shortened to what was kept.

    Parameters
    ----------
    compact
        Whether tokens that are kept in this forward are renumbered; what the cache remembers goes first.
    rows, columns
        B and T of the new tokens.
    """

    def __init__(self, architecture: Architecture, compact: bool, rows: int, columns: int, cache: Any) -> None:
        self.architecture, self.compact, self.columns, self.cache = architecture, compact, columns, cache
        self.record = remembered(cache)
        self.seen = tokens_seen(cache)
        self.kept: torch.Tensor | None = None  # new columns (B, K) that are left, -1 for padding; None: all
        self.kept_padded = False
        self._cut: dict[Any, Any] = {}
        if self.record is not None:
            self.compact = self.record.compact
            self._check_cache(self.record, rows)

    def _check_cache(self, record: CacheRecord, rows: int) -> None:
        if rows != record.rows:
            raise PruningNotSupported(
                f"the cache was filled by {record.rows} rows and is continued by {rows}: expand the prompt "
                "before the prefill (num_return_sequences, num_beams do)."
            )
        # A decode step looks at the last layer only: it is run for every token.
        added, with_state = self.seen - record.columns, self.architecture.state_layers
        layers = [index for index in range(len(record.held)) if index not in with_state]  # a state has no length
        layers = layers if self.columns > 1 else layers[-1:]
        for index in layers:
            held, expected = cached_tokens(self.cache, index), record.held[index]
            if added < 0 or held != expected + added:
                raise PruningNotSupported(
                    f"past_key_values: layer {index} holds {held} tokens where {expected} kept ones and {added} later "
                    f"ones were expected (layer 0 holds {self.seen}): crop a pruned cache only by a negative number of "
                    "tokens, at most those added after prefill."
                )

    def layer_arguments(self, index: int, layer: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments that layer ``index`` gets; ``arguments`` itself where they are right as they are."""
        return self._shortened(index, arguments)

    def finish(self) -> None:
        """After the last layer."""

    def close(self) -> int:
        """After the forward and before `finish`, also after an exception.

        Returns how many of the last columns are not the caller's (query tokens of a chunk), which the output leaves
        out.
        """
        return 0

    def _shortened(self, index: int, arguments: dict[str, Any]) -> dict[str, Any]:
        """Layer arguments for the kept tokens, out of those that the model made for all columns.

        Example, layer 4 of a model whose 10 prompt tokens are cut to 6 there (keys ``[0, 1, 4, 7, 8, 9]``):

        ====================  ======================  ========================  =============================
        argument              made by the model       prefill, after the cut    third decoded token
        ====================  ======================  ========================  =============================
        hidden_states         (1, 10, D)              (1, 6, D), cut before     (1, 1, D), as it is
        position_embeddings   (1, 10, d) each         rows 0, 1, 4, 7, 8, 9     of position 12, as they are
        attention_mask        (1, 1, 10, 10)          (1, 1, 6, 6)              (1, 1, 1, 13) -> (1, 1, 1, 9)
        ====================  ======================  ========================  =============================

        In the last column two tokens were decoded before: the layer's keys are 0, 1, 4, 7, 8, 9, 10, 11 and 12.
        """
        if index in self.architecture.state_layers:
            return arguments if self.kept is None else self._for_a_state(index, arguments)
        # What earlier forwards cut is in the cache's record, what this one cut is in `kept`.
        recorded = self.record.kept[index] if self.record is not None else None
        cut = self.kept is not None or recorded is not None
        mask, alibi = arguments.get("attention_mask"), arguments.get("alibi")
        padded = self.kept_padded or (recorded is not None and self.record.padded[index])
        if not cut and (self.record is None or (mask is None and alibi is None)):
            return arguments
        hidden = arguments["hidden_states"]
        arguments = dict(arguments)
        if self.kept is not None:
            self._shorten_positions(arguments)
            for name in STATE_MASKS:
                if name in arguments:
                    arguments[name] = self._state_mask(index, arguments[name])
        if mask is not None or alibi is not None or padded:
            keys, padded = self._keys(index, hidden, padded)
            if keys is not None:
                arguments["attention_mask"] = self._cut_mask(index, mask, keys, padded, hidden)
                if alibi is not None:
                    arguments["alibi"] = self._cut_alibi(alibi, keys, hidden.shape[0])
        if cut and self.compact:
            self._renumber(index, arguments, hidden)
        if cut:
            self._refuse_windows_over_kept_tokens(index)
        return arguments

    def _for_a_state(self, index: int, arguments: dict[str, Any]) -> dict[str, Any]:
        """What a layer with a state gets: its mask (B, T) tells padding among the new columns, and nothing else."""
        arguments = dict(arguments)
        self._shorten_positions(arguments)
        arguments["attention_mask"] = self._state_mask(index, arguments.get("attention_mask"))
        return arguments

    def _state_mask(self, index: int, mask: Any) -> torch.Tensor | None:
        """The mask (B, K) of what keeps a state in layer ``index``, out of the (B, T) that the model made."""
        if mask is None and not self.kept_padded:
            return None
        if mask is not None and (not torch.is_tensor(mask) or mask.shape[1:] != (self.columns,)):
            found = tuple(mask.shape) if torch.is_tensor(mask) else type(mask).__name__
            raise PruningNotSupported(
                f"layer {index} keeps a state and got attention_mask {found} where (rows, {self.columns}) was "
                "expected: give the 2-D mask of the tokenizer."
            )
        if (id(mask), "state") not in self._cut:
            real = (self.kept >= 0).long()
            if mask is not None:
                real = real.to(mask.device, mask.dtype) * gather_tokens(mask, self.kept)
            self._cut[id(mask), "state"] = (mask, real)
        return self._cut[id(mask), "state"][1]

    def _shorten_positions(self, arguments: dict[str, Any]) -> None:
        if self.seen and self.architecture.counts_windows_itself and arguments.get("position_embeddings") is not None:
            # Flash attention takes position ids with gaps for packed sequences, as many keys as queries in each.
            arguments["position_ids"] = None
        for name in ("position_embeddings", "position_ids"):
            if arguments.get(name) is not None:
                arguments[name] = self._cut_tables(arguments[name])
        if arguments.get("per_layer_input") is not None:  # a part of the embeddings for this layer alone (B, T, any)
            arguments["per_layer_input"] = gather_tokens(arguments["per_layer_input"], self.kept)
        if arguments.get("cache_position") is not None:
            # transformers < 5.4: places in this layer's cache, which gets the kept tokens only.
            arguments["cache_position"] = arguments["cache_position"][: self.kept.shape[1]]

    def _cut_tables(self, tables: Any) -> Any:
        if isinstance(tables, (tuple, list)):
            return type(tables)(self._cut_tables(table) for table in tables)
        if not torch.is_tensor(tables):
            return tables
        # A multimodal model's places in time, height and width are (3, B, T): moved, the token axis comes second.
        spatial = tables.dim() > 2 and tables.shape[0] in (3, 4) and tables.shape[2] == self.columns != tables.shape[1]
        whole = tables.movedim(0, -1) if spatial else tables
        axis = next((a for a in (1, 0) if whole.dim() > a and whole.shape[a] == self.columns), None)
        if whole.dim() < 2 or axis is None or (axis == 0 and self.kept.shape[0] > 1):
            raise PruningNotSupported(
                f"a position table of shape {tuple(tables.shape)} has no axis of {self.columns} tokens in second "
                "place: see CONTRIBUTING.md, 'Adding a family'."
            )
        # All layers share the same tables: cut each once per stage. The reference to the whole table stays: the id of a
        # freed tensor could be reused by another.
        if (id(tables), "table") not in self._cut:
            cut = gather_tokens(whole, self.kept, dim=axis)
            self._cut[id(tables), "table"] = (tables, cut.movedim(-1, 0) if spatial else cut)
        return self._cut[id(tables), "table"][1]

    def _keys(self, index: int, hidden: torch.Tensor, padded: bool) -> tuple[torch.Tensor | None, bool]:
        """Columns (B or 1, n) of the unpruned model's keys that layer ``index`` attends to, -1 for padding."""
        record, device, seen = self.record, hidden.device, self.seen
        recorded = record.kept[index] if record is not None else None
        new = self.columns if self.kept is None else self.kept.shape[1]
        attended = attended_keys(self.cache, index, cached_tokens(self.cache, index), new) if seen else new
        if record is not None and record.compressed:
            self._refuse_with_compression(padded, index)
            recorded = torch.zeros(1, record.held[index], dtype=torch.int64, device=device)
        if recorded is None and self.kept is None and attended == seen + new:
            return None, padded
        known = (id(recorded), attended, device, "keys")
        if known not in self._cut:
            # Up to three runs of columns: [0, 1, 4, 7, 8, 9] of the recorded prompt, [10, 11] decoded since, and the
            # new token's own 0, which is column 12 of all that was seen.
            kept = self.kept if self.kept is not None else torch.arange(self.columns, device=device)[None]
            parts = [torch.where(kept < 0, kept, kept + seen).to(device)]
            covered = 0 if recorded is None else record.columns
            if seen > covered:
                parts.insert(0, torch.arange(covered, seen, device=device)[None])
            if recorded is not None:
                parts.insert(0, recorded.to(device))
            rows = max(part.shape[0] for part in parts)
            keys = torch.cat([part.expand(rows, -1) for part in parts], dim=1)
            # A layer with a window of 4 holds, and attends to, the last of these only: [9, 10, 11, 12].
            self._cut[known] = (recorded, keys[:, -attended:])
        return self._cut[known][1], padded

    def _cut_mask(self, index: int, mask: Any, keys: torch.Tensor, padded: bool, hidden: torch.Tensor) -> Any:
        known = (id(mask), id(keys), "mask")
        if known not in self._cut:
            # A sliding layer's mask may cover the last columns only: of 13 seen, the last 8. Key 9 is its column 4.
            covers = mask.shape[-1] if torch.is_tensor(mask) else self.seen + self.columns
            shifted = keys
            if (missing := self.seen + self.columns - covers) > 0:
                shifted = torch.where(keys < 0, keys, keys - missing)
            elif missing < 0:
                raise PruningNotSupported(
                    f"attention_mask of shape {tuple(mask.shape)} at layer {index} covers more than the "
                    f"{self.seen + self.columns} tokens seen: give the 2-D mask (rows, tokens) of the tokenizer."
                )
            cut = cut_mask(
                mask, self.kept, shifted, padded,
                query_count=hidden.shape[1], backend=self.architecture.backend, dtype=hidden.dtype,
            )  # fmt: skip
            self._cut[known] = (mask, keys, cut)
        return self._cut[known][2]

    def _cut_alibi(self, alibi: torch.Tensor, keys: torch.Tensor, rows: int) -> torch.Tensor:
        """The position bias (B * H, 1, columns) or (B, H, 1, columns) of the keys that the layer holds."""
        known = (id(alibi), id(keys), "alibi")
        if known not in self._cut:
            cut = gather_tokens(alibi.reshape(rows, -1, alibi.shape[-1]), keys, dim=2)
            self._cut[known] = (alibi, keys, cut.reshape(*alibi.shape[:-1], cut.shape[-1]))
        return self._cut[known][2]

    def _renumber(self, index: int, arguments: dict[str, Any], hidden: torch.Tensor) -> None:
        """``positions="compact"``: new tokens count on from the keys that this layer holds."""
        held = cached_tokens(self.cache, index) if self.seen else 0
        if index == 0 and self.record is not None and self.record.kept[0] is not None:
            held -= self.record.columns - self.record.kept[0].shape[1]  # layer 0 answers with all that was seen
        known = (held, hidden.shape[1], "compact")
        if known not in self._cut:
            ids = torch.arange(held, held + hidden.shape[1], device=hidden.device)[None]
            self._cut[known] = (self.architecture.rotary()(hidden, position_ids=ids), ids)
        arguments["position_embeddings"], arguments["position_ids"] = self._cut[known]

    def _refuse_windows_over_kept_tokens(self, index: int) -> None:
        longest = self.architecture.counts_positions_up_to
        if longest is not None and self.seen + self.columns > longest:
            raise PruningNotSupported(
                f"{self.architecture.model_type} scales attention by position from {longest + 1} tokens on "
                f"(attn_temperature_tuning), counted in kept tokens: prune prompts of at most {longest} tokens, answer "
                f"included (these are {self.seen + self.columns})."
            )
        window = self.architecture.sliding_window(index)
        if window is not None and self.seen + self.columns > window and self.architecture.counts_windows_itself:
            raise PruningNotSupported(
                f"attn_implementation={self.architecture.backend!r} counts a sliding window ({window}) in kept tokens, "
                "not in original positions: load the model with attn_implementation='sdpa'."
            )

    def _refuse_with_compression(self, padded: bool, index: int) -> None:
        if padded or self.record.any_padding or self.compact or self.architecture.sliding_window(index) is not None:
            raise PruningNotSupported(
                "a KV-cache compression ran inside the pruned prefill, and which keys it kept is not known here: "
                "combine the two without padding, sliding windows, alibi and positions='compact'."
            )
