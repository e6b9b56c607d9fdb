"""ASL (arXiv 2601.07667): FastKV's cut, at the layer where the ranks of the tokens have settled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sdtp_lib import budget
from sdtp_lib.config import PruningConfig
from sdtp_lib.methods.method import Method, MethodBudget, MethodScorer, depth
from sdtp_lib.methods.votes import decided, votes
from sdtp_lib.model_shape import ModelShape
from sdtp_lib.pruning.stage import Scorer, Stage


@dataclass(frozen=True, kw_only=True)
class ASL(Method):
    """The cut waits until the variance of token ranks over the last layers falls below a threshold; batch 1.

    The variance is that of each best token's rank over the last ``layers_compared`` layers, mean over these tokens,
    over the variance of ranks drawn by chance (T^2 / 12). Which layers may cut, the threshold's value and this
    normalisation are ours, where the paper's text was not at hand.

    Attributes
    ----------
    first_depth, last_depth
        The cut falls between these shares of L, at the last one in any case.
    threshold
        Relative variance below which ranks count as settled.
    keep, window, kernel
        As in FastKV; the cache is left as it is.
    layers_compared
        Layers over which a rank's variance is taken.
    """

    name: ClassVar[str] = "asl"
    paper: ClassVar[str] = "2601.07667"
    ranks: ClassVar[bool] = False
    first_depth: float = 0.25
    last_depth: float = 0.75
    threshold: float = 0.1
    keep: float = 0.2
    window: int = 8
    kernel: int = 7
    layers_compared: int = 4

    @property
    def differs(self) -> str:
        return "which layers may cut, and from which threshold on, is this project's choice"

    @property
    def differs_at_speedup(self) -> str:
        return (
            "at a wanted speed-up the cut waits no longer than that can still be reached, and leaves as many tokens as "
            f"it asks for at its layer, not always {100 * self.keep:g} %"
        )

    def config(self, layers: int) -> PruningConfig:
        at = range(depth(self.first_depth, layers), depth(self.last_depth, layers) + 1)
        return PruningConfig(tuple(at), keep_mass=1.0, sink_tokens=0, local_ratio=0.0, min_local_tokens=self.window)

    def budget_for(self, model: Any) -> PruningConfig | ASLBudget:
        shape = ModelShape.from_model(model)
        config = self.config(shape.num_layers)
        return config if self.speedup is None else ASLBudget(config, self.speedup, shape, method=self)

    def _once(self, layer: int) -> PruningConfig:
        return PruningConfig((layer,), sink_tokens=0, local_ratio=0.0, min_local_tokens=self.window)

    def highest(self, shape: ModelShape, layer: int, tokens: int) -> float:
        """The speed-up by FLOPs if a cut before ``layer`` leaves the window alone."""
        return budget.speedup_limit(shape, self._once(layer).replace(keep_ratio=1e-6), tokens)

    def scorer_for(self, model: Any) -> Scorer:
        return MethodScorer(self, self._score_of(ModelShape.from_model(model)))

    def _score_of(self, shape: ModelShape) -> Callable[[Stage], torch.Tensor]:
        stages = self.config(shape.num_layers).layers

        def kept_at(layer: int, tokens: int) -> int | None:
            """How many a cut before ``layer`` leaves; None where it comes too late for the wanted speed-up."""
            if self.speedup is None:
                return max(self.window, int(self.keep * tokens + 1e-9))
            if self.highest(shape, layer, tokens) < self.speedup:
                return None
            once = self._once(layer)
            ratio = budget.find_keep_ratio(shape, once, tokens, speedup=self.speedup)
            return budget.keep_count(tokens, layer, once.replace(keep_ratio=ratio))

        def score(stage: Stage) -> torch.Tensor:
            index, tokens = stage.layer_index, stage.positions.shape[1]
            everything = torch.ones_like(stage.positions, dtype=torch.bool)
            # Whether the cut is done only the device knows: a mark that the tokens carry on.
            done = stage.carried.get("asl cut", ~everything)
            scores = votes(stage.attention_just_paid(self.window), self.kernel).sum(dim=1)
            scores[:, -self.window :] = torch.inf
            order = tokens - 1 - scores.flip(1).argsort(dim=1, descending=True, stable=True)
            rank = torch.zeros_like(scores).scatter(
                1, order, torch.arange(tokens, device=order.device).to(scores)[None]
            )
            known = [stage.carried[name] for name in sorted(stage.carried) if name.startswith("asl rank")]
            ranks = torch.stack([*known, rank])[-self.layers_compared :]
            kept = kept_at(index, int(tokens))
            best = rank < (kept if kept is not None else tokens)
            spread = (ranks.var(dim=0, unbiased=False) * best).sum() / best.sum() / (tokens * tokens / 12)
            last = index == stages[-1] or kept_at(index + 1, int(tokens)) is None
            settled = (spread < self.threshold) & (len(ranks) == self.layers_compared) | last
            cut = settled & ~done.any()
            stage.carried["asl cut"] = done | cut
            stage.carried[f"asl rank {index:04d}"] = rank
            return decided(torch.where(cut, best, everything))

        return score


@dataclass(frozen=True)
class ASLBudget(MethodBudget):
    """ASL's stages where a cut before the first of them reaches the wanted speed-up; its score counts the tokens."""

    def _solve(self, tokens: int) -> PruningConfig:
        highest = self.method.highest(self.shape, self.config.layers[0], tokens)
        if highest < self.speedup and tokens > self.method.window:
            raise budget.SpeedupOutOfReach(
                f"speedup={self.speedup:g}: {self.method.name} prefills {tokens} tokens at most {highest:.2f}x as fast "
                f"with its first cut before layer {self.config.layers[0]}: ask for less."
            )
        return self.config
