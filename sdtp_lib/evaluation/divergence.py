"""How far a pruned model is from the unpruned one on a continuation: its logits, KL and loss.

The continuation of a prompt is scored from the prompt's cache, full or pruned; it is itself never pruned. Axes: R
continuation tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdtp_lib.architectures.caches import cache_argument, cache_in
from sdtp_lib.architectures.layers import position_argument
from sdtp_lib.config import PruningConfig
from sdtp_lib.methods import Method
from sdtp_lib.methods.variant import Variant
from sdtp_lib.pruning.stage import Scorer
from sdtp_lib.pruning.trace import PruningTrace


def continuation_logits(
    model: Any,
    prompt_ids: Sequence[int],
    continuation_ids: Sequence[int],
    config: PruningConfig | Method | str | None = None,
    scorer: Scorer | None = None,
    *,
    chunk: int | None = None,
) -> tuple[Tensor, PruningTrace | None]:
    """`logits_along` the continuation (R, V), and the trace of the pruned prefill.

    ``config`` and ``scorer`` say how to prune the prompt; both None for the unpruned model, whose trace is None. An
    entry of `sdtp_lib.methods`, or its name, brings its scorer.
    """
    variant = Variant("", config, scorer)
    if (config is None) != (scorer is None) and not isinstance(variant.budget, Method):
        raise ValueError("give both config and scorer to prune, or neither for the unpruned model.")
    with variant.applied(model) as trace:
        return logits_along(model, prompt_ids, continuation_ids, chunk=chunk), trace


@torch.no_grad()
def logits_along(
    model: Any,
    prompt_ids: Sequence[int],
    continuation_ids: Sequence[int],
    *,
    prefilled: Callable[[Any], None] | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Logits that predict each continuation token, read from the cache of one prefill of the prompt.

    The model runs as it is, or as a ``with`` around this call has made it.

    Parameters
    ----------
    prompt_ids, continuation_ids
        Token ids of one prompt (at least two) and of what follows it (at least one).
    prefilled
        Called with the prompt's cache once it is full: for a clock, and for the bytes that it holds.
    chunk
        Hand the prompt over in chunks of so many tokens.

    Returns
    -------
    Tensor (R, V) of float32
        Row i predicts ``continuation_ids[i]``.
    """
    if len(prompt_ids) < 2 or len(continuation_ids) < 1:
        raise ValueError(f"{len(prompt_ids)} prompt and {len(continuation_ids)} continuation tokens: need 2 and 1.")
    prompt = torch.tensor([list(prompt_ids)], device=model.device)
    given = torch.tensor([list(continuation_ids)[:-1]], device=model.device)
    if chunk is None:
        first = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        logits = first.logits[:, -1:]
    else:
        first = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), prefill_chunk_size=chunk, max_new_tokens=1,
            do_sample=False, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        logits = first.logits[0][:, None]
    cache = cache_in(first)
    if prefilled is not None:
        prefilled(cache)
    if given.shape[1]:
        # Positions said, not left to the cache's length: a KV-cache compression makes that shorter than the prompt.
        places = position_argument(model, torch.arange(given.shape[1], device=given.device)[None] + len(prompt_ids))
        rest = model(input_ids=given, **cache_argument(model, cache), use_cache=True, **places).logits
        logits = torch.cat([logits, rest], dim=1)
    return logits[0].float()


def kl_divergence(full_logits: Tensor, pruned_logits: Tensor) -> float:
    """Mean over R of KL(full || pruned), nats per token, from logits (R, V)."""
    full, pruned = F.log_softmax(full_logits, dim=-1), F.log_softmax(pruned_logits, dim=-1)
    return F.kl_div(pruned, full, reduction="none", log_target=True).sum(-1).double().mean().item()


def mean_loss(logits: Tensor, token_ids: Sequence[int]) -> float:
    """Mean negative log-likelihood of ``token_ids`` (R,), nats per token."""
    return F.cross_entropy(logits, torch.tensor(list(token_ids), device=logits.device)).item()
