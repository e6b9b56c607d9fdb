"""A prompt that comes in chunks, each cut before the next: memory grows with a chunk and with what is kept.

What a prompt asks for stands at its end, which is not there yet when the first chunk is scored. So the prompt's last
tokens, its *query tokens*, go with each chunk as if they came right behind it: scorers see them as the last tokens, at
their positions in the prompt; after the forward their keys are taken out of every layer's cache again. They decide only
which tokens a chunk keeps: for the kept ones the result is that of one forward over the whole prompt.

Knows no hooks and nothing of ``generate``; the prompt is a `chunked_prompt`. Axes: B rows, n columns of a forward.

Example: 100 tokens in chunks of 40, the last 8 as query tokens. The forwards are over columns 0 to 39 and 92 to 99;
40 to 79 and 92 to 99; 80 to 99. After the first, layers before the first cut hold 40 keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sdtp_lib.architectures.caches import drop_last, hold_longer
from sdtp_lib.architectures.layers import Architecture
from sdtp_lib.config import PruningConfig
from sdtp_lib.pruning.chunked_prompt import ChunkedPrompt
from sdtp_lib.pruning.plan import Budget, on_device
from sdtp_lib.pruning.prefill import Prefill
from sdtp_lib.pruning.selection import gather_tokens
from sdtp_lib.pruning.stage import Scorer, Stage
from sdtp_lib.pruning.trace import PruningTrace


class ChunkPrefill(Prefill):
    """The forward over one chunk and the query tokens; cuts the chunk by its share of the whole prompt's budget."""

    def __init__(
        self, whole: ChunkedPrompt, architecture: Architecture, wanted: Budget, scorer: Scorer, trace: PruningTrace,
        cache: Any,
    ) -> None:  # fmt: skip
        self.whole, self.queries, self._longer = whole, whole.queries_here, []
        real, tokens = whole.at(whole.real), whole.at(whole.ids)
        self.query_rows = real[:, real.shape[1] - self.queries :].sum(dim=1).tolist()
        super().__init__(architecture, wanted, scorer, trace, real.sum(dim=1).tolist(), tokens, cache)
        self.keeps_all = False  # one chunk knows its own scores only: they are noted for the whole prompt
        self.positions = whole.at(whole.positions)
        self.prompt_lengths = on_device(whole.lengths, tokens.device)

    def _planned(
        self, _architecture: Architecture, _wanted: Budget, _lengths: list[int]
    ) -> tuple[PruningConfig, list[list[int]]]:
        # Query tokens are in every layer besides: a chunk of 40 that keeps 22, with 8 query tokens, is 48 and then 30.
        plan = self.whole.plan(self.whole.number)
        return self.whole.config, [[n + own for n, own in zip(row, self.query_rows, strict=True)] for row in plan]

    def _begin_trace(self) -> None:
        if not self.whole.number:
            self.trace.begin(self.whole.lengths, torch.tensor(self.whole.plan()))
            self.trace.query_tokens = self.queries * (len(self.whole.columns) - 2)

    def layer_arguments(self, index: int, layer: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        """As in `Prefill`; a layer with a window keeps what the query tokens would push out of it."""
        given = super().layer_arguments(index, layer, arguments)
        if self.queries and hold_longer(self.cache, index, self.queries):
            self._longer.append(index)
        return given

    def close(self) -> int:
        """As in `ForwardPass`; windows are as they were."""
        for index in self._longer:
            hold_longer(self.cache, index, -self.queries)
        self._longer = []
        return self.queries

    def _stage(self, index: int, layer: nn.Module, given: dict[str, Any], **known: Any) -> Stage:
        return super()._stage(index, layer, given, queries=self.queries or None, **known)

    def _ends(self, index: int) -> tuple[int, list[int]]:
        """First and last tokens that always stay, by position in the prompt; this forward's query tokens among them."""
        positions = self.positions
        ends = zip(self.whole.lengths, self.whole.local, strict=True)
        last = on_device([length - local.get(index, 0) for length, local in ends], positions.device)
        always = (positions < self.config.sink_tokens) | (positions >= last[:, None])
        if self.whole.protect is not None:
            own = self.whole.at(self.whole.protect).to(positions.device)
            always |= own if self.kept is None else gather_tokens(own, self.kept)
        self.protected = always & (positions >= 0)
        return 0, list(self.query_rows)

    def _counts(self, index: int, _scores: torch.Tensor, _local: list[int]) -> list[int]:
        return self.plan[index]

    def _note(self, index: int, *columns: torch.Tensor) -> None:
        self.whole.note(index, *columns)

    def finish(self) -> None:
        """Take the query tokens out; remember the cuts with the cache; after the last chunk the trace is whole."""
        if self.queries:
            # They are the last keys of every layer, and the last columns of every cut.
            drop_last(self.cache, self.queries)
            self.columns -= self.queries
            self.lengths = [count - own for count, own in zip(self.lengths, self.query_rows, strict=True)]
            self.segments = [(first, kept[:, : -self.queries], padded) for first, kept, padded in self.segments]
        self._remember()
        self.whole.number += 1
        if not self.whole.pending:
            self.whole.fill(self.trace)
