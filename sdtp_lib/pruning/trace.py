"""`PruningTrace`: what a pruned prefill kept, where, and out of which scores.

A record, filled by the engine, read by people. Positions are 0-based indices among a row's own (non-padding) prompt
tokens. Axes: B batch, N tokens before a cut, K tokens after it, L layers.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtp_lib import budget
from sdtp_lib.extras import extra
from sdtp_lib.model_shape import ModelShape
from sdtp_lib.records import atomic_write

if TYPE_CHECKING:
    import pandas
    import torch


def _no_model() -> None:
    return None


def _change(share: float) -> str:
    """What is left of a cost as a change of it: 0.5 is -50%, 1.37 is +37%."""
    return f"{share - 1:+.0%}" if abs(share - 1) >= 0.005 else "0%"


@dataclass(repr=False)
class PruningTrace:
    """The last prefill inside a ``with token_pruning(...)``; tokens decoded later leave it as it was.

    Attributes
    ----------
    kept_positions : dict[int, Tensor (B, K)]
        Configured layer -> positions of the tokens kept by the cut there, -1 for left padding.
    scored_positions : dict[int, Tensor (B, N)]
        Configured layer -> positions of the tokens left before the cut there.
    scores : dict[int, Tensor (B, N)]
        Configured layer -> the scores of ``scored_positions``, -inf for padding. Those of a prefill that could drop
        nothing are computed when they are first read.
    prompt_lengths : list[int]
        Prompt tokens of each row.
    tokens_per_row : Tensor (L, B)
        Tokens computed in each layer, by all passes.
    kv_bytes_per_layer : list[int]
        Bytes of keys and values in the cache right after the prefill; empty without a cache.
    passes : list[Tensor (L, B)]
        The same for each pass over the layers: one, or two where a method makes a second.
    keys_per_layer : list[int]
        Keys of the longest row that a KV budget left in each layer; empty without one.
    query_tokens : int
        Where the prompt came in chunks: query tokens that went with them, computed in each layer on top of these.
    prefills : int
        Prefills seen so far.
    scorer : str
        The name of what scored.
    model : callable
        Gives the model, or None once it is gone; asked for FLOPs by ``print``.
    scored_when_read : list of callables
        What computes scores that nobody has read yet.
    not_pruned : str
        Why nothing was pruned by the last prefill, or where none has run, of what the ``with`` saw; empty where
        something was, where nothing was to be (a keep ratio of 1), or nothing was seen.
    """

    kept_positions: dict[int, torch.Tensor] = field(default_factory=dict)
    scored_positions: dict[int, torch.Tensor] = field(default_factory=dict)
    prompt_lengths: list[int] = field(default_factory=list)
    tokens_per_row: torch.Tensor | None = None
    kv_bytes_per_layer: list[int] = field(default_factory=list)
    passes: list[torch.Tensor] = field(default_factory=list)
    keys_per_layer: list[int] = field(default_factory=list)
    query_tokens: int = 0
    prefills: int = 0
    scorer: str = ""
    model: Callable[[], Any] = field(default=_no_model, compare=False)
    not_pruned: str = ""
    scored_when_read: list[Callable[[], None]] = field(default_factory=list, compare=False)
    _scores: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def scores(self) -> dict[int, torch.Tensor]:
        """Configured layer -> scores (B, N)."""
        waiting, self.scored_when_read = self.scored_when_read, []
        for score in waiting:
            score()
        return self._scores

    def begin(self, prompt_lengths: list[int], tokens_per_row: torch.Tensor) -> None:
        """Forget the previous prefill (called by the engine)."""
        self._forget()
        self.passes, self.prompt_lengths, self.tokens_per_row = [tokens_per_row], list(prompt_lengths), tokens_per_row
        self.prefills += 1

    def end_early(self) -> None:
        """Forget a prefill that an error ended (called by the engine): what was planned is not what was computed."""
        self._forget()
        self.not_pruned = "the last prefill ended in an error"
        self.prefills -= 1

    def _forget(self) -> None:
        self.kept_positions, self.scored_positions, self._scores, self.scored_when_read = {}, {}, {}, []
        self.kv_bytes_per_layer, self.keys_per_layer, self.passes = [], [], []
        self.prompt_lengths, self.tokens_per_row = [], None
        self.not_pruned, self.query_tokens = "", 0

    @property
    def tokens_per_layer(self) -> list[int]:
        """Tokens computed in each of the L layers, of the longest row."""
        return self._counts().max(dim=1).values.tolist()

    @property
    def compression_ratio(self) -> float:
        """1/tau of the paper: prompt tokens / mean tokens computed in a layer, padding not counted."""
        return sum(self.prompt_lengths) / self._counts().sum(dim=1).double().mean().item()

    def summary(self) -> dict[str, str]:
        """What the last prefill cost and saved, in words: the parts of ``print(trace)``."""
        if self.tokens_per_row is None:
            return {"not pruned": self.not_pruned or "no prefill ran inside the `with`"}
        longest, rows, last = max(self.prompt_lengths), len(self.prompt_lengths), int(self.passes[-1][-1].max())
        found = {
            "prompt": f"{longest:,} tokens" + (f" (longest of {rows})" if rows > 1 else ""),
            "last layer": f"{last:,} tokens ({last / longest:.0%})",
            "1/tau": f"{self.compression_ratio:.2f}",
            **self._savings(longest),
            "scorer": self.scorer,
        }
        if self.keys_per_layer and self.passes[-1][-1].tolist() == self.prompt_lengths:
            found["cut"] = "the KV cache alone, after a whole prefill"
        return found | ({"not pruned": self.not_pruned} if self.not_pruned else {})

    def _savings(self, longest: int) -> dict[str, str]:
        """FLOPs and KV bytes beside the unpruned model's, where the model's FLOPs can be counted."""
        model = self.model()
        try:
            shape = ModelShape.from_model(model) if model is not None else None
        except ValueError:  # a family whose FLOPs do not follow from its weights
            shape = None
        if shape is None:
            return {}
        passes = [counts.max(dim=1).values.tolist() for counts in self.passes]
        full = [longest] * len(passes[-1])
        # A pass that stops on the way computes no logits.
        flops = sum(budget.prefill_flops(shape, each, logits_positions=int(each[-1] > 0)) for each in passes)
        flops += budget.prefill_flops(shape, [self.query_tokens] * len(full), logits_positions=0)
        flops /= budget.prefill_flops(shape, full)
        kept = budget.kv_bytes(shape, self.keys_per_layer or passes[-1], 1) / budget.kv_bytes(shape, full, 1)
        # Two passes over a prompt of which most stays cost more than one.
        fewer = f"{1 / flops:.2f}x fewer" if flops <= 1 else f"{1 / flops:.2f}x: more than the unpruned model's"
        return {"prefill FLOPs": f"{_change(flops)} ({fewer})", "KV cache": _change(kept)}

    def __str__(self) -> str:
        """One line."""
        return ", ".join(f"{name}: {value}" for name, value in self.summary().items())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """A small table for a notebook."""
        left = "style='text-align:left'"
        rows = "".join(
            f"<tr><th {left}>{html.escape(name)}</th><td {left}>{html.escape(value)}</td></tr>"
            for name, value in self.summary().items()
        )
        return f"<table>{rows}</table>"

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: a trace outlives its model."""
        return {**self.__dict__, "_scores": self.scores, "scored_when_read": [], "model": _no_model}

    def _counts(self) -> torch.Tensor:
        if self.tokens_per_row is None:
            why = self.not_pruned or "run model(...) or model.generate(...) inside the `with` first"
            raise ValueError(f"the trace is empty: {why}.")
        return self.tokens_per_row

    def to_frame(self) -> pandas.DataFrame:
        """One line per row, stage and token left before it: ``row, layer, position, score, kept``."""
        with extra("train"):
            import pandas

        self._counts()
        frames = []
        for layer, positions in self.scored_positions.items():
            for row, (before, scores, after) in enumerate(
                zip(positions.cpu(), self.scores[layer].cpu(), self.kept_positions[layer].cpu(), strict=True)
            ):
                real = before >= 0
                before, scores = before[real].numpy(), scores[real].double().numpy()
                kept = pandas.Series(before).isin(after.tolist())
                frames.append(
                    pandas.DataFrame({"row": row, "layer": layer, "position": before, "score": scores, "kept": kept})
                )
        return pandas.concat(frames, ignore_index=True)

    def write_log(self, path: str | Path) -> Path:
        """Write the prune log as JSON lines, one per stage and row, over a temporary name.

        Fields: ``layer, row, tokens_in, tokens_kept, tokens_pruned, score_min, score_max, score_mean``. No token text.
        """
        self._counts()
        path = Path(path)
        lines = []
        for layer, positions in self.scored_positions.items():
            for row in range(positions.shape[0]):
                scores = self.scores[layer][row][positions[row] >= 0].double()
                tokens_in, kept = scores.numel(), int((self.kept_positions[layer][row] >= 0).sum())
                entry = {"layer": layer, "row": row, "tokens_in": tokens_in, "tokens_kept": kept}
                entry["tokens_pruned"] = tokens_in - kept
                entry["score_min"], entry["score_max"] = scores.min().item(), scores.max().item()
                entry["score_mean"] = scores.mean().item()
                lines.append(json.dumps(entry))
        with atomic_write(path) as temporary:
            Path(temporary).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path
