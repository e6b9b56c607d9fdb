"""Pruning simulated by masking keys out of attention (paper, section 3.3), so that gradients reach the pruners.

A training row holds prompt and response, and no token leaves it: who lives at a stage is a mask. Axes: B batch, T
tokens, K columns that hold the living tokens of a row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sdtp_lib import losses
from sdtp_lib.architectures import layer_inputs
from sdtp_lib.architectures_asking import attention_looked_back_at
from sdtp_lib.architectures_attention import key_bias
from sdtp_lib.blend import standardised
from sdtp_lib.looking_back import ASKING_TOKENS, LAYERS_BACK, looked_back
from sdtp_lib.pruners import TokenPruners
from sdtp_lib.selection import gather_tokens
from sdtp_lib.training_config import TrainingConfig


@contextlib.contextmanager
def simulated_pruning(
    model: nn.Module, pruners: TokenPruners, prompt_mask: Tensor, keep_ratio: float, config: TrainingConfig
) -> Iterator[dict[int, Tensor]]:
    """Pruning by attention masking inside one forward, each stage scored on what the earlier stages left.

    Scores are those of inference, blend included.

    Yields layer -> keep (B, T), filled by the forward: near 0 where a stage has dropped a token, in the graph.

    Parameters
    ----------
    prompt_mask
        (B, T) bool: the prompt's tokens; padding and response never count as dropped.

    Raises
    ------
    ValueError
        For a blend that asks with another window than the one that training reads.
    """
    run = _Simulation(pruners, prompt_mask, keep_ratio, config)
    with (
        layer_inputs(model, pruners.layers) as run.seen,
        attention_looked_back_at(model, run.back, ASKING_TOKENS, run.living) as run.paid,
        key_bias(model, run.bias),
    ):
        yield run.keeps


class _Simulation:
    """One forward under simulated pruning: who is alive so far, and how little of a token each stage has left."""

    def __init__(self, pruners: TokenPruners, prompt_mask: Tensor, keep_ratio: float, config: TrainingConfig) -> None:
        self.pruners, self.keep_ratio, self.config = pruners, keep_ratio, config
        self.back = pruners.looked_back
        if pruners.blend is not None and pruners.blend.attention:
            if pruners.blend.window != ASKING_TOKENS:
                raise ValueError(
                    f"blend.window={pruners.blend.window} cannot be simulated in training: give {ASKING_TOKENS}, or no "
                    "blend."
                )
            self.back = self.back or looked_back(pruners.layers)
        self.positions = (prompt_mask.long().cumsum(-1) - 1).masked_fill(~prompt_mask, -1)
        self.lengths = prompt_mask.sum(-1)
        self.alive = prompt_mask
        self.keeps: dict[int, Tensor] = {}
        self.log_keep: Tensor | None = None  # (B, T), the sum over the stages so far
        self.memory: Tensor | None = None  # (B, T), the pruner's own scores at the stage before
        # Filled by the forward: what enters each layer, and what was just attended to.
        self.seen: dict[int, Tensor] = {}
        self.paid: dict[int, Tensor] = {}

    def living(self, index: int) -> Tensor:
        """(B, T) who lives at layer ``index``; asked for by whoever reads attention there."""
        # What the stage is shown is complete by then, so its cut comes before others look at this layer.
        if index in self.paid:
            self._cut(index)
        return self.alive

    def bias(self, index: int, key: Tensor) -> Tensor | None:
        """(B, T) what is added to the attention scores of each key at layer ``index``; None before the first cut."""
        self._cut(index)
        return None if self.log_keep is None else self.log_keep.to(key.device, key.dtype)

    def _cut(self, index: int) -> None:
        # A recomputed forward would ask again; the stages of one forward come once each, in order.
        if index not in self.pruners.layers or index in self.keeps:
            return
        config = self.config
        scores = self._scores(index)
        open_to_cut = self.alive & losses.scorable(
            self.alive, config.sink_tokens, config.local_ratio, config.min_local_tokens
        )
        living, free = self.alive.sum(-1, keepdim=True), open_to_cut.sum(-1, keepdim=True)
        share = (living * self.keep_ratio - (living - free)).clamp(min=0) / free.clamp(min=1)
        soft = losses.soft_keep(scores, open_to_cut, share, config.temperature, config.keep_floor)
        hard = torch.where(soft >= (1 + config.keep_floor) / 2, 1.0, config.keep_floor).to(soft.dtype)
        keep = losses.straight_through(soft, hard) if config.straight_through else soft
        self.keeps[index] = keep
        self.alive = self.alive & (hard > 0.5)
        self.log_keep = keep.log() if self.log_keep is None else self.log_keep + keep.log()

    def _scores(self, index: int) -> Tensor:
        """(B, T) scores as the engine has them, from the living tokens side by side; 0 elsewhere."""
        pruners, order, left = self.pruners, *side_by_side(self.alive)
        mass = gather_tokens(self.paid[index], order) if index in self.paid else None
        own = mass if pruners.looked_back else None
        places = self.positions.gather(1, order)
        memory = None if self.memory is None else self.memory.gather(1, order)
        scores = pruners.score(index, gather_tokens(self.seen[index], order), places, left, self.lengths, own, memory)
        self.memory = at_all(standardised(scores, left).detach(), order, self.alive)
        if pruners.blend is not None:
            heads = None if mass is None else mass.chunk(LAYERS_BACK, dim=-1)[-1].transpose(1, 2)
            scores = pruners.blend.mixed(scores, left, places, heads)
        return at_all(scores, order, self.alive)


def side_by_side(alive: Tensor) -> tuple[Tensor, Tensor]:
    """Columns (B, K) of the living tokens of (B, T), in order and first, and which of them (B, K) do live."""
    order = (~alive).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(alive.sum(-1).max())]
    return order, alive.gather(1, order)


def at_all(values: Tensor, order: Tensor, alive: Tensor) -> Tensor:
    """``values`` (B, K) of the living put back at their columns ``order``: (B, T), 0 elsewhere."""
    return torch.zeros_like(alive, dtype=values.dtype).scatter(1, order, values)
