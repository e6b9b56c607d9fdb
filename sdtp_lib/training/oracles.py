"""Labels as methods of a comparison: what a label would be worth as a score if a pruner predicted it perfectly.

Labels come from the response, which a real method has not seen: they are a bound, not a method for use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sdtp_lib import scorers
from sdtp_lib.evaluation.methods import Compared
from sdtp_lib.pruning.stage import Scorer
from sdtp_lib.training.labels import saliency_of


def oracle_methods(labels: Sequence[str] = ("gradient_x_hidden", "removal")) -> list[Compared]:
    """Each label of `saliency` as a given score: what it would be worth if a pruner predicted it perfectly."""

    def known(label: str) -> Callable[..., Scorer]:
        def from_sample(model: Any, sample: Mapping[str, Any], layers: Sequence[int]) -> Scorer:
            return scorers.given(_labels(model, sample, layers, label))

        return from_sample

    return [Compared(f"oracle: {label}", known(label), block="oracle", from_sample=True) for label in labels]


def _labels(model: Any, sample: Mapping[str, Any], layers: Sequence[int], label: str) -> dict[int, Tensor]:
    ids = torch.tensor([[*sample["prompt_ids"], *sample["response_ids"]]], device=model.device)
    response = torch.zeros_like(ids)
    response[:, len(sample["prompt_ids"]) :] = 1
    return saliency_of(model, ids, torch.ones_like(ids), response, layers, label)
