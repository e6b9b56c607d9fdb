"""SpecPrefill (arXiv 2502.02789): a small draft model says which chunks of the prompt the large one reads at all."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional

from sdtp_lib import budget
from sdtp_lib.architectures.attention_readings import attention_in_forward
from sdtp_lib.architectures.layers import num_layers
from sdtp_lib.config import PruningConfig, PruningNotSupported
from sdtp_lib.methods.method import Method, depth
from sdtp_lib.methods.votes import best_blocks, block_means, decided
from sdtp_lib.pruning.engine import two_passes
from sdtp_lib.pruning.second_pass import TwoPasses
from sdtp_lib.pruning.stage import LAYERS_AT_HAND, Scorer, Stage


@dataclass(frozen=True, kw_only=True)
class SpecPrefill(Method):
    """Chunks of 32 tokens by the attention of a draft's look-ahead tokens: a tenth is read, at original positions.

    Per look-ahead token: attention to the prompt, averaged over 13 neighbours, the most over heads and layers; then the
    mean over tokens and over chunks. **Without a ``draft``** the model's own first layers stand in for one, and the
    prompt's last tokens for the look-ahead: then it is not the paper's method, and rows should say "no draft". What a
    draft costs is not counted in `at_speedup`. Batch 1; the last token always stays.

    Attributes
    ----------
    draft
        A smaller causal LM with the same tokenizer.
    keep
        Share of the chunks that stay (the paper: 0.05 to 0.3).
    look_ahead
        Tokens that the draft generates; their attention scores the prompt.
    chunk, kernel
        Tokens of a chunk; neighbours that attention is averaged over.
    own_depth
        Without a draft: the share of L that the first pass runs.
    """

    name: ClassVar[str] = "specprefill"
    paper: ClassVar[str] = "2502.02789"
    draft: Any = None
    keep: float = 0.1
    look_ahead: int = 8
    chunk: int = 32
    kernel: int = 13
    own_depth: float = 0.25

    @property
    def differs(self) -> str:
        if self.draft is not None:
            return ""
        return "without a draft model, which is not the paper's method: the model's own first layers stand in for it"

    @property
    def differs_at_speedup(self) -> str:
        return "at a wanted speed-up as many tokens are read as that leaves, not the paper's share of whole chunks"

    def config(self, layers: int) -> PruningConfig:
        how = {"keep_mass": 1.0} if self.speedup is None else {"keep_ratio": self.keep}
        return PruningConfig(
            (depth(self.own_depth, layers),), sink_tokens=0, local_ratio=0.0, min_local_tokens=1, **how
        )

    def scorer(self, _layers: int) -> Scorer:
        return self._score_by_own_layers

    def passes(self, config: PruningConfig, layers: int, prompt_tokens: int) -> list[list[int]]:
        kept = budget.tokens_per_layer(config, layers, prompt_tokens)[-1]
        first = config.layers[0]
        own = [] if self.draft is not None else [[prompt_tokens] * first + [0] * (layers - first)]
        return [*own, [kept] * layers]

    def around(self, model: Any, _trace: Any) -> contextlib.AbstractContextManager:
        scores = None if self.draft is None else self._score_by_draft
        return two_passes(model, TwoPasses(renumber=False, scores=scores))

    def _score_by_own_layers(self, stage: Stage) -> torch.Tensor:
        behind = range(max(0, stage.layer_index - LAYERS_AT_HAND), stage.layer_index)
        paid = stage.attention_paid(behind, self.look_ahead)
        return self._chunks(torch.stack([self._strongest_head(each) for each in paid]).amax(dim=0).mean(dim=1))

    def _score_by_draft(self, arguments: Mapping[str, Any]) -> torch.Tensor:
        ids = arguments.get("input_ids")
        if ids is None or ids.shape[0] > 1:
            raise PruningNotSupported("specprefill's draft reads token ids, one row at a time: give input_ids (1, T).")
        draft, tokens = self.draft, ids.shape[1]
        ids = ids.to(draft.device)
        with torch.no_grad():
            longer = draft.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.look_ahead,
                min_new_tokens=self.look_ahead, do_sample=False,
            )  # fmt: skip
            with attention_in_forward(
                draft, range(num_layers(draft)), self.look_ahead,
                lambda _, paid: self._strongest_head(paid[..., :tokens]),
            ) as found:  # fmt: skip
                draft(longer, use_cache=False, logits_to_keep=1)
        return self._chunks(torch.stack([each.to(ids.device) for each in found.values()]).amax(dim=0).mean(dim=1))

    def _strongest_head(self, paid: torch.Tensor) -> torch.Tensor:
        """(B, w, N): the share of each query's attention to these tokens, pooled, the most over heads."""
        shares = paid / paid.sum(dim=-1, keepdim=True).clamp_min(1e-30)
        pooled = functional.avg_pool1d(shares.flatten(0, 2)[:, None], self.kernel, stride=1, padding=self.kernel // 2)
        return pooled.view_as(shares).amax(dim=1)

    def _chunks(self, scores: torch.Tensor) -> torch.Tensor:
        means = block_means(scores, torch.ones_like(scores, dtype=torch.bool), self.chunk)
        if self.speedup is not None:
            return means
        count = math.ceil(math.ceil(scores.shape[1] / self.chunk) * self.keep)
        stays = best_blocks(means, self.chunk, count=count)
        stays[:, -1] = True
        return decided(stays)
