"""A prefill in two passes: a first finds which tokens stay, the second runs all layers on those alone.

The second pass is a `Prefill` that starts with fewer tokens and drops no more: before layer 0 hidden states, position
tables and masks are cut to what the first pass kept, as they are before any later layer. Knows no hooks.

Example: 10 tokens, of which a first pass over layers 0 to 3 keeps 0, 1, 4, 7, 8, 9. Then layers 0 to 5 run on those
six, at these positions or renumbered 0 to 5, and every layer's cache holds six keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sdtp_lib.config import PruningNotSupported
from sdtp_lib.pruning.kv_budget import KVBudget
from sdtp_lib.pruning.prefill import Prefill
from sdtp_lib.pruning.selection import gather_tokens


@dataclass(frozen=True)
class TwoPasses:
    """A prefill in two passes: the first finds which tokens stay, the second runs all layers on those alone.

    Attributes
    ----------
    renumber
        Whether the second pass counts the kept tokens 0..K-1 (one row at a time), or leaves each its position.
    stop
        Whether the first pass ends where its last stage has chosen; else it runs all layers.
    scores
        Instead of a first pass of this model: maps the arguments of the forward to scores (B, T) of its columns.
    """

    renumber: bool = True
    stop: bool = True
    scores: Callable[[dict[str, Any]], torch.Tensor] | None = None


class SecondPass(Prefill):
    """All layers on what ``first``, a pass over the same prompt, has kept; the trace counts both."""

    def __init__(self, first: Prefill, cache: Any, how: TwoPasses, kv: KVBudget | None) -> None:
        no_ids = torch.empty(len(first.lengths), first.columns, 0, device=first.positions.device)  # nothing is scored
        super().__init__(
            first.architecture, first.wanted, first.scorer, first.trace, first.lengths, no_ids, cache, kv=kv
        )
        if how.renumber and len(first.lengths) > 1:
            raise PruningNotSupported(
                f"renumbered positions with a batch of {len(first.lengths)}: rows would need tables of their own: "
                "use batch 1 or positions='original'."
            )
        self.stages, self.compact = (), how.renumber
        self.left, self.padded, self.positions = list(first.left), first.padded, first.positions
        self.plan = [list(first.left)] * len(self.plan)
        self.before = torch.tensor(first.plan)
        if first.kept is not None:
            self.kept, self.kept_padded = first.kept, first.kept_padded
            self.segments.append((0, self.kept, self.padded))
            for index in range(len(self.plan)):
                self._refuse_windows_over_kept_tokens(index)

    def _begin_trace(self) -> None:
        """Nothing: the first pass began it."""

    def layer_arguments(self, index: int, layer: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        """As in `Prefill`, from the kept tokens on."""
        if index == 0 and self.kept is not None:
            arguments = {**arguments, "hidden_states": gather_tokens(arguments["hidden_states"], self.kept)}
        return super().layer_arguments(index, layer, arguments)


def choose_by(first: Prefill, scores: torch.Tensor) -> None:
    """Cut ``first`` as at its first stage by known ``scores`` (B, T); no layer has run, and none needs to."""
    # The cut gathers hidden states, and there are none yet: a tensor (B, T, 0) stands for them.
    first.scorer = lambda _stage: scores
    stands_for_hidden = torch.empty(*scores.shape, 0, device=first.positions.device)
    first.cut_tokens(first.config.layers[0], None, {"hidden_states": stands_for_hidden})
    first.plan = [[0] * len(first.lengths)] * len(first.plan)
