"""A prompt that ``generate`` hands over in chunks: its tokens, what stays of each chunk, what each forward is over.

Knows no layers; `chunks` runs the forwards. Axes: B rows, T columns of the prompt, C of a chunk, w query tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from sdtp_lib.architectures.caches import keys_can_be_taken_out, tokens_seen
from sdtp_lib.config import PruningConfig, PruningNotSupported
from sdtp_lib.pruning.plan import Budget, chunk_counts, chunk_size
from sdtp_lib.pruning.stage import Scorer, query_tokens
from sdtp_lib.pruning.trace import PruningTrace


class ChunkedPrompt:
    """The whole prompt: its tokens, what stays of each chunk, and what was kept so far.

    Parameters
    ----------
    ids : Tensor (B, T)
        The new tokens, rows padded on the left.
    real : Tensor (B, T) of bool
        Which are no padding.
    size, queries
        C and w.
    protect : Tensor (B, T) of bool, optional
        Tokens that no stage drops.
    """

    def __init__(
        self,
        ids: torch.Tensor,
        real: torch.Tensor,
        size: int,
        queries: int,
        wanted: Budget,
        num_layers: int,
        protect: torch.Tensor | None = None,
    ) -> None:
        self.ids, self.real, self.size, self.queries, self.protect = ids, real, size, queries, protect
        total = ids.shape[1]
        self.columns = [*range(0, total, size), total]  # where chunks begin and end
        self.number = 0  # chunks that have run
        self.lengths = real.sum(dim=1).tolist()
        self.config = wanted.for_prompt(max(self.lengths))
        counted = real.cumsum(dim=1)
        self.positions = (counted - 1).masked_fill(~real, -1)
        ends = torch.tensor(self.columns[1:], device=ids.device) - 1
        self.local: list[dict[int, int]] = []  # per row: stage -> last tokens that always stay
        self._counts: list[list[list[int]]] = []  # per row: layer, chunk -> tokens
        for row, (length, upto) in enumerate(zip(self.lengths, counted[:, ends].tolist(), strict=True)):
            own = None if protect is None else protect[row, real[row]]
            counts, local = chunk_counts(wanted.for_prompt(length), num_layers, [0, *upto], own)
            self._counts.append(counts)
            self.local.append(local)
        self._noted: dict[int, list[tuple[torch.Tensor, ...]]] = {}

    @property
    def pending(self) -> bool:
        """Whether a chunk is still to come."""
        return self.number < len(self.columns) - 1

    @property
    def here(self) -> tuple[int, int]:
        """First column of the next chunk, and the one behind it."""
        return self.columns[self.number], self.columns[self.number + 1]

    @property
    def queries_here(self) -> int:
        """Query tokens that go with the next chunk; none with the last one, which has them."""
        return self.queries if self.number < len(self.columns) - 2 else 0

    def plan(self, number: int | None = None) -> list[list[int]]:
        """Tokens of each row in each layer (L lists of B): of one chunk, or of the whole prompt."""
        layers = range(len(self._counts[0]))
        if number is None:
            return [[sum(counts[layer]) for counts in self._counts] for layer in layers]
        return [[counts[layer][number] for counts in self._counts] for layer in layers]

    def expand(self, rows: int) -> None:
        """Repeat each row for ``rows`` in all, as beams and several answers do."""
        times = rows // len(self.lengths)
        if times * len(self.lengths) != rows:
            raise PruningNotSupported(
                f"prefill_chunk_size: a chunk of {rows} rows is none of the prompt of {len(self.lengths)} rows that "
                "generate was given: leave prefill_chunk_size out."
            )
        if times > 1:
            self.ids, self.real, self.positions = (
                each.repeat_interleave(times, dim=0) for each in (self.ids, self.real, self.positions)
            )
            self.protect = None if self.protect is None else self.protect.repeat_interleave(times, dim=0)
            self.lengths, self.local, self._counts = (
                [value for value in each for _ in range(times)] for each in (self.lengths, self.local, self._counts)
            )

    def at(self, values: torch.Tensor) -> torch.Tensor:
        """The columns of (B, T) ``values`` that the next forward is over: the chunk and the query tokens."""
        start, end = self.here
        chunk = values[:, start:end]
        return torch.cat([chunk, values[:, -self.queries_here :]], dim=1) if self.queries_here else chunk

    def with_queries(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The stack's arguments for the next chunk with the query tokens behind it.

        Raises
        ------
        PruningNotSupported
            Where this is not the next chunk of the prompt, or its arguments cannot be made longer.
        """
        start, end = self.here
        found = dict(arguments)
        ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
        if ids is None or ids.shape[1] != end - start or not torch.equal(ids, self.ids[:, start:end]):
            raise PruningNotSupported(
                "prefill_chunk_size: the forward is over other tokens than the next chunk of the prompt (some releases "
                "of transformers feed a cached prefix again): leave prefill_chunk_size out."
            )
        if mask is not None and (not torch.is_tensor(mask) or mask.dim() != 2):
            raise PruningNotSupported(
                "prefill_chunk_size: this model makes its attention mask outside its decoder: leave it out."
            )
        real = self.real[:, start:end]
        if not torch.equal(real, torch.ones_like(real) if mask is None else mask[:, start - end :].bool()):
            raise PruningNotSupported(
                "prefill_chunk_size: the prompt has padding that generate was not told of: give attention_mask."
            )
        if not self.queries_here:
            return found
        queries = self.real[:, -self.queries_here :]
        found["input_ids"] = self.at(self.ids)
        if mask is not None:
            found["attention_mask"] = torch.cat([mask, queries.to(mask.dtype)], dim=1)
        places = arguments.get("position_ids")
        if places is not None:
            if places.dim() != 2:
                raise PruningNotSupported(
                    f"prefill_chunk_size: position_ids of shape {tuple(places.shape)}: give one position per token."
                )
            behind = places[:, -1:] + 1
            if mask is not None:  # a row whose tokens all come in later chunks has no last position yet
                behind = torch.where(real[:, -1:], behind, mask.sum(dim=1, keepdim=True).to(behind.dtype))
            steps = (queries.cumsum(dim=1) - 1).clamp_min(0).to(behind.dtype)
            found["position_ids"] = torch.cat([places.expand(len(queries), -1), behind + steps], dim=1)
        if arguments.get("cache_position") is not None:  # transformers < 5.4
            here = arguments["cache_position"]
            more = torch.arange(1, self.queries_here + 1, device=here.device)
            found["cache_position"] = torch.cat([here, here[-1:] + more])
        return found

    def note(self, index: int, *columns: torch.Tensor) -> None:
        """Keep a chunk's positions before the cut at ``index``, their scores, and positions after it, for the trace."""
        queries = self.queries_here
        kept = tuple(each[:, : each.shape[1] - queries] for each in columns)
        self._noted.setdefault(index, []).append(kept)

    def fill(self, trace: PruningTrace) -> None:
        """Write what all chunks kept into ``trace``, as if there had been one forward."""
        for index, noted in self._noted.items():
            before, scores, after = (torch.cat(each, dim=1) for each in zip(*noted, strict=True))
            trace.scored_positions[index] = _padded_left(before, before)
            trace.scores[index] = _padded_left(scores, before)
            trace.kept_positions[index] = _padded_left(after, after)
        trace.passes = [torch.tensor(self.plan())]
        trace.tokens_per_row = trace.passes[0]


def prompt_in_chunks(
    ids: Any,
    mask: Any,
    cache: Any,
    size: int,
    *,
    wanted: Budget,
    config: PruningConfig,
    scorer: Scorer,
    num_layers: int,
    protection: Callable[[int, int, int], torch.Tensor | None],
    whole_only: Mapping[str, Any],
) -> ChunkedPrompt | None:
    """What ``generate(ids, attention_mask=mask, prefill_chunk_size=size)`` on ``cache`` prunes chunk by chunk.

    None where one forward takes the prompt, or where nothing of it is pruned (added to a cache, ``prune="first"``).
    ``protection`` maps rows, tokens seen and new tokens to (B, T) booleans or None; ``whole_only`` names what must be
    None here.

    Raises
    ------
    PruningNotSupported
        For what cannot be decided, or taken back, chunk by chunk.
    """
    if not torch.is_tensor(ids) or ids.dim() != 2:
        raise PruningNotSupported(
            f"prefill_chunk_size={size} without input_ids: embeddings are not cut into chunks: leave it out."
        )
    seen = tokens_seen(cache)
    width = mask.shape[1] if torch.is_tensor(mask) else ids.shape[1]
    new = ids.shape[1] - seen if width == ids.shape[1] and seen < ids.shape[1] else ids.shape[1]
    queries = min(query_tokens(scorer), new)
    if new <= size or (seen and (config.prune == "first" or new <= config.min_prompt_tokens)):
        return None
    for name, value in whole_only.items():
        if value is not None:
            raise PruningNotSupported(
                f"prefill_chunk_size={size} with {name}, which need the whole prompt's tokens at once: "
                "leave prefill_chunk_size out."
            )
    if config.keep_mass is not None:
        raise PruningNotSupported(
            f"keep_mass={config.keep_mass} with prefill_chunk_size={size}: which tokens hold that share of all scores "
            "is known after the last chunk only: use keep_ratio, or leave prefill_chunk_size out."
        )
    if cache is not None and not keys_can_be_taken_out(cache):
        raise PruningNotSupported(
            f"past_key_values={type(cache).__name__} with prefill_chunk_size={size}: keys of the query tokens are "
            "taken out of the cache again, which one that quantises or offloads cannot do: use a dynamic cache."
        )
    ids = ids[:, -new:]
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, -new:].bool()
    return ChunkedPrompt(
        ids, real, chunk_size(new, size, queries), queries, wanted, num_layers, protection(len(ids), seen, new)
    )


def _padded_left(values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """``values`` (B, n) with those at real ``positions`` (not -1) last, as narrow as the longest row."""
    real = positions >= 0
    if bool(real.all()):
        return values
    order = real.long().argsort(dim=1, stable=True)
    return values.gather(1, order)[:, values.shape[1] - int(real.sum(dim=1).max()) :]
