"""Pruning simulated by masking keys out of attention (paper, section 3.3), so that gradients reach the pruners.

A training row holds prompt and response, and no token leaves it: which of them are kept is a mask.
Axes: B batch, T tokens, K columns that hold the kept tokens of a row, D hidden size, A attention inputs.

Example: a prompt of 10 tokens and a response of 4 in one row, T = 14. Stages at layers 4 and 7; the first keeps columns
0, 1, 4, 7, 8, 9.

- Layer 4: all prompt tokens are left. Hidden states (1, 14, D) are gathered to (1, 10, D), scored (1, 10), and the
  scores put back to (1, 14). The soft cut gives ``keep`` (1, 14): 1 at what stays, at protected tokens and in the
  response, ``keep_floor`` at columns 2, 3, 5 and 6. From this layer on ``log keep`` is added to the attention scores of
  each key: a dropped token is still there, but next to nothing of it is seen.
- Layer 7: six columns are left. They are gathered to (1, 6, D), so that column 4 has 1 and 7 as neighbours, as in the
  engine, and scored (1, 6). The bias is now the sum of both stages' ``log keep``.

With ``straight_through``, ``keep`` has hard values, as in the engine, and the soft cut's gradient, which tells each
score which way to go.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sdtp_lib import budget
from sdtp_lib.architectures.attention_bias import bias_route, key_bias
from sdtp_lib.architectures.attention_readings import attention_of_earlier_layers
from sdtp_lib.architectures.layers import Architecture, describe, layer_inputs
from sdtp_lib.pruning.selection import gather_tokens
from sdtp_lib.pruning.stage import LAYERS_BACK, QUERY_TOKENS, earlier_layers
from sdtp_lib.scorers.blend import Blend, standardised
from sdtp_lib.scorers.stage_network import StageInputs
from sdtp_lib.scorers.token_pruners import TokenPruners
from sdtp_lib.training import losses
from sdtp_lib.training.config import TrainingConfig


@contextlib.contextmanager
def simulated_pruning(
    model: nn.Module | Architecture,
    pruners: TokenPruners,
    prompt_mask: Tensor,
    keep_ratio: float,
    config: TrainingConfig,
    protect: Tensor | None = None,
) -> Iterator[dict[int, Tensor]]:
    """Pruning by attention masking inside one forward, each stage scored on what the earlier stages left.

    Scores are those of inference, blend included.

    Yields layer -> keep (B, T), filled by the forward: near 0 where a stage has dropped a token, in the graph.

    Parameters
    ----------
    prompt_mask
        (B, T) bool: the prompt's tokens; padding and response never count as dropped.
    protect
        (B, T) bool: tokens of the prompt that no stage drops, as in `token_pruning`.

    Raises
    ------
    ValueError
        For a blend whose window of query tokens is not the one that training reads, and for a model in training mode
        with gradient checkpointing: backward would run its layers again, without what was simulated.
    """
    run = _Simulation(pruners, prompt_mask, keep_ratio, config, protect)
    architecture = describe(model)
    _refuse_checkpointing(architecture.model)
    bias_route(architecture)  # found before the hooks below are on, for it runs the model
    with (
        layer_inputs(architecture, pruners.layers) as run.seen,
        attention_of_earlier_layers(architecture, run.back, QUERY_TOKENS, run.kept_at) as run.paid,
        key_bias(architecture, run.bias),
    ):
        yield run.keeps


def _refuse_checkpointing(model: nn.Module) -> None:
    if any(part.training and getattr(part, "gradient_checkpointing", False) for part in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is in training mode with gradient checkpointing, which runs layers a second time "
            "in backward, when pruning is no longer simulated: call model.eval(), or turn checkpointing off."
        )


class KeptTokens:
    """The prompt tokens of a batch that are left at a stage, scored side by side as in the engine.

    ``protect`` (B, T): tokens that no stage drops, besides the first and the last of each row.

    Attributes
    ----------
    mask
        (B, T) bool: the kept tokens. Whoever drops some replaces it.
    order, left
        Set by `score`: columns (B, K) of the kept tokens, in order and first, and which (B, K) of them are no filler.
    """

    def __init__(self, pruners: TokenPruners, prompt_mask: Tensor, protect: Tensor | None = None) -> None:
        self.pruners, self.mask, self.protect = pruners, prompt_mask, protect
        self.positions = (prompt_mask.long().cumsum(-1) - 1).masked_fill(~prompt_mask, -1)
        self.lengths = prompt_mask.sum(-1)
        self.memory: Tensor | None = None  # (B, T), the pruner's own scores at the stage before

    def score(self, layer: int, hidden: Tensor, paid: Tensor | None, blend: Blend | None = None) -> Tensor:
        """Scores (B, K) of the kept tokens at ``layer``, from a row's hidden states (B, T, D) and attention (B, T, A).

        The part of ``paid`` that went to tokens dropped since then is shared among the kept ones. ``blend`` mixes the
        score with attention and recency.
        """
        # mask [1, 1, 0, 0, 1, 0, 0, 1, 1, 1]: a stable sort by "dropped" puts columns 0, 1, 4, 7, 8, 9 first, and the
        # longest row's K = 6 cuts off the rest.
        self.order = (~self.mask).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(self.mask.sum(-1).max())]
        self.left = self.mask.gather(1, self.order)
        mass = None if paid is None else share_of_kept(gather_tokens(paid, self.order), self.left, paid.sum(dim=1))
        own = mass if self.pruners.earlier_layers else None
        places = self.positions.gather(1, self.order)
        memory = None if self.memory is None else self.memory.gather(1, self.order)
        states = gather_tokens(hidden, self.order)
        # In float32 under autocast too, as in inference: in half precision many scores are equal, at the cut above all.
        with torch.autocast(states.device.type, enabled=False):
            scores = self.pruners.score(layer, StageInputs(states, places, self.left, self.lengths, own, memory))
        self.memory = self.put_back(standardised(scores, self.left).detach())
        if blend is None:
            return scores
        heads = None if mass is None else mass.chunk(LAYERS_BACK, dim=-1)[-1].transpose(1, 2)
        return blend.mixed(scores, self.left, places, heads)

    def open_to_cut(self, config: TrainingConfig) -> Tensor:
        """(B, T) the kept tokens that this stage may drop."""
        free = losses.scorable(self.mask, config.sink_tokens, config.local_ratio, config.min_local_tokens)
        return free if self.protect is None else free & ~self.protect

    def kept(self, keep_ratio: float, open_to_cut: Tensor) -> Tensor:
        """(B,) how many tokens ``open_to_cut`` stay: the keep ratio counts all kept tokens, as in a prefill."""
        # T = 1,024 at 0.7: 716 stay, 107 of them protected, so 609 of the 917 others (not 0.7 of those).
        counts = zip(self.mask.sum(-1).tolist(), open_to_cut.sum(-1).tolist(), strict=True)
        free = [max(0, budget.share_of(count, keep_ratio) - (count - cut)) for count, cut in counts]
        return torch.tensor(free, device=self.mask.device)

    def put_back(self, values: Tensor) -> Tensor:
        """``values`` (B, K) of the kept tokens at their columns: (B, T), 0 elsewhere."""
        return torch.zeros_like(self.mask, dtype=values.dtype).scatter(1, self.order, values)


class _Simulation:
    """One forward under simulated pruning: which tokens are kept so far, and ``log keep`` of each stage, summed."""

    def __init__(
        self,
        pruners: TokenPruners,
        prompt_mask: Tensor,
        keep_ratio: float,
        config: TrainingConfig,
        protect: Tensor | None,
    ) -> None:
        self.pruners, self.keep_ratio, self.config = pruners, keep_ratio, config
        self.back = pruners.earlier_layers
        if pruners.blend is not None and pruners.blend.attention:
            if pruners.blend.window != QUERY_TOKENS:
                raise ValueError(
                    f"blend.window={pruners.blend.window} cannot be simulated in training: give {QUERY_TOKENS}, or no "
                    "blend."
                )
            self.back = self.back or earlier_layers(pruners.layers)
        self.tokens = KeptTokens(pruners, prompt_mask, protect)
        self.keeps: dict[int, Tensor] = {}
        self.log_keep: Tensor | None = None  # (B, T), the sum over the stages so far
        self.with_graph = torch.is_grad_enabled()  # attention is read without one, and a cut may come from there
        # Filled by the forward: what enters each layer, and what was just attended to.
        self.seen: dict[int, Tensor] = {}
        self.paid: dict[int, Tensor] = {}

    def kept_at(self, index: int) -> Tensor:
        """(B, T) the tokens kept at layer ``index``; called by the hook that reads attention there."""
        # The stage's own inputs are complete by then, so it cuts before later stages' attention is read in this layer.
        if index in self.paid:
            self._cut(index)
        return self.tokens.mask

    def bias(self, index: int, key: Tensor) -> Tensor | None:
        """(B, T) what is added to the attention scores of each key at layer ``index``; None before the first cut."""
        self._cut(index)
        return None if self.log_keep is None else self.log_keep.to(key.device, key.dtype)

    def _cut(self, index: int) -> None:
        # Called twice per layer, and again where a forward is recomputed: each stage cuts once, in order.
        if index in self.pruners.layers and index not in self.keeps:
            with torch.set_grad_enabled(self.with_graph):
                self._cut_once(index)

    def _cut_once(self, index: int) -> None:
        config, tokens = self.config, self.tokens
        scores = tokens.put_back(tokens.score(index, self.seen[index], self.paid.get(index), self.pruners.blend))
        open_to_cut = tokens.open_to_cut(config)
        kept = tokens.kept(self.keep_ratio, open_to_cut)
        soft = losses.soft_keep(scores, open_to_cut, kept, config.temperature, config.keep_floor)
        # By rank: a soft value of one half is off by a rounding for some floors, and equal scores would all stay.
        stay = ~open_to_cut | losses.highest(scores.detach(), open_to_cut, kept)
        hard = torch.where(stay, 1.0, config.keep_floor).to(soft.dtype)
        keep = losses.straight_through(soft, hard) if config.straight_through else soft
        self.keeps[index] = keep
        tokens.mask = tokens.mask & stay
        self.log_keep = keep.log() if self.log_keep is None else self.log_keep + keep.log()


def share_of_kept(mass: Tensor, left: Tensor, total: Tensor) -> Tensor:
    """Attention (B, K, A) as if its whole sum, ``total`` (B, A), went to the kept tokens (``left``)."""
    mass = mass * left[..., None]
    return mass * (total[:, None] / mass.sum(dim=1, keepdim=True).clamp_min(1e-6))
