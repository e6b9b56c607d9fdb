"""Labels as methods of a comparison: what a label would be worth as a score if a pruner predicted it perfectly.

Labels come from the response, which a real method has not seen: they are a bound, not a method for use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sdtp_lib import budget, scorers
from sdtp_lib.config import PruningConfig
from sdtp_lib.methods.variant import Variant
from sdtp_lib.pruning.selection import select_positions
from sdtp_lib.pruning.stage import Scorer
from sdtp_lib.training.labels import saliency_of


def oracle_methods(labels: Sequence[str] = ("gradient_x_hidden", "removal")) -> list[Variant]:
    """Each label of `saliency` as a given score: what it would be worth if a pruner predicted it perfectly."""

    def known(label: str) -> Callable[..., Scorer]:
        def from_sample(model: Any, sample: Mapping[str, Any], layers: Sequence[int]) -> Scorer:
            return scorers.given(_labels(model, sample, layers, label))

        return from_sample

    return [Variant(f"oracle: {label}", scorer=known(label), kind="oracle", from_sample=True) for label in labels]


def step_by_step(label: str, config: PruningConfig) -> Variant:
    """A label computed anew at each stage of ``config``, on the prompt as the stages before have cut it: an oracle."""

    def from_sample(model: Any, sample: Mapping[str, Any], _layers: Sequence[int]) -> Scorer:
        tokens, found, keep = len(sample["prompt_ids"]), {}, {}
        left = torch.arange(tokens)
        for layer in config.layers:
            found[layer] = _labels(model, sample, [layer], label, keep)[layer]
            local = budget.local_count(len(left), config.local_ratio, config.min_local_tokens)
            stay = budget.keep_count(len(left), layer, config)
            scores = found[layer][:, left.to(found[layer].device)]
            left = left[select_positions(scores, [len(left)], [stay], config.sink_tokens, [local])[0].cpu()]
            keep[layer] = torch.ones(1, tokens + len(sample["response_ids"]), device=model.device)
            keep[layer][:, :tokens] = 0
            keep[layer][:, left] = 1
        return scorers.given(found)

    return Variant(f"oracle: {label}, step by step", scorer=from_sample, kind="oracle", from_sample=True)


def _labels(
    model: Any, sample: Mapping[str, Any], layers: Sequence[int], label: str, keep: Mapping[int, Tensor] | None = None
) -> dict[int, Tensor]:
    ids = torch.tensor([[*sample["prompt_ids"], *sample["response_ids"]]], device=model.device)
    response = torch.zeros_like(ids)
    response[:, len(sample["prompt_ids"]) :] = 1
    return saliency_of(model, ids, torch.ones_like(ids), response, layers, label, keep)
