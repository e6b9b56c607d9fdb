"""Attention over all tokens, for stages whose layers see a window only: that of the last layer which saw all tokens.

Knows one layer, what it ran on, and which of these tokens are left; not which families have windows (`architectures`)
nor who asks (`stage`). Axes: B rows, M tokens that the layer ran on, N of them left, K after a further cut, H heads, w
queries, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from sdtp_lib.architectures.attention_weights import attention_from_last
from sdtp_lib.pruning.selection import gather_tokens


@dataclass(frozen=True)
class FarSight:
    """The last layer that attended to all tokens, in a family whose other layers see a window only (Gemma 3).

    Before layer 10 of Gemma 3, layers 7, 8 and 9 attend to the last 512 tokens only; layer 5 attended to all, and says
    more about tokens far back. It ran before a cut: what it paid to dropped tokens is shared among those left.

    Attributes
    ----------
    index, layer
        That decoder layer.
    hidden_states, layer_arguments, valid, past
        As in `Stage`, for the M tokens that it ran on.
    columns : Tensor (B, N) of int64 or None
        Which of the M are left, -1 for padding; None: all.
    read : dict
        Attention that was read already, by window.
    """

    index: int
    layer: nn.Module
    hidden_states: torch.Tensor
    layer_arguments: Mapping[str, Any]
    valid: torch.Tensor | None
    past: tuple[torch.Tensor, torch.Tensor] | None = None
    columns: torch.Tensor | None = None
    read: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)

    def after_cut(self, chosen: torch.Tensor) -> FarSight:
        """The same when only the columns ``chosen`` (B, K), -1 for padding, of the N tokens are left."""
        if self.columns is not None:
            chosen = gather_tokens(self.columns, chosen.to(self.columns.device)).masked_fill(chosen < 0, -1)
        return replace(self, columns=chosen.to(self.hidden_states.device))

    def attention(self, window: int) -> torch.Tensor:
        """Attention (B, H, w, N) of its last ``window`` tokens; what dropped ones got is shared among those left."""
        if window not in self.read:
            self.read[window] = attention_from_last(
                self.layer, self.hidden_states, self.layer_arguments, window, self.valid, self.past
            )
        paid = self.read[window]
        if self.columns is None:
            return paid
        where = self.columns[:, None, None, :].expand(-1, *paid.shape[1:3], -1)
        left = paid.gather(-1, where.clamp_min(0)).masked_fill(where < 0, 0)
        return left * (paid.sum(-1, keepdim=True) / left.sum(-1, keepdim=True).clamp_min(1e-12))

    def mass(self, window: int) -> torch.Tensor:
        """(B, H, N): that summed over the window, an even share being 1 / N of it with a past as without."""
        tokens = self.hidden_states.shape[1]
        held = tokens + (0 if self.past is None else self.past[0].shape[2])
        return self.attention(window).sum(dim=2) * (held / tokens)
