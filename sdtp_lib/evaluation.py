"""What pruning costs in quality: divergence from the unpruned model, perplexity, answers, and paired differences.

The continuation of a prompt is scored from the prompt's cache, full or pruned; it is itself never pruned. Knows the
engine and scorers, not plots. Axes: R continuation tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sdtp_lib import budget, scorers
from sdtp_lib.architectures import position_argument
from sdtp_lib.config import PruningConfig
from sdtp_lib.engine import token_pruning
from sdtp_lib.model_shape import ModelShape
from sdtp_lib.records import RowWriter
from sdtp_lib.saliency import saliency_of
from sdtp_lib.stage import Scorer
from sdtp_lib.trace import PruningTrace

LOSSLESS_PERPLEXITY_PERCENT = 5.0


@torch.no_grad()
def continuation_logits(
    model: Any,
    prompt_ids: Sequence[int],
    continuation_ids: Sequence[int],
    config: PruningConfig | None = None,
    scorer: Scorer | None = None,
) -> tuple[Tensor, PruningTrace | None]:
    """Logits that predict each continuation token, read from the (pruned) cache of one prefill of the prompt.

    Parameters
    ----------
    prompt_ids, continuation_ids
        Token ids of one prompt (at least two) and of what follows it (at least one).
    config, scorer
        How to prune the prompt; both None for the unpruned model.

    Returns
    -------
    logits : Tensor (R, V) of float32
        Row i predicts ``continuation_ids[i]``.
    trace : PruningTrace or None
        What the prefill kept.
    """
    if (config is None) != (scorer is None):
        raise ValueError("give both config and scorer to prune, or neither for the unpruned model.")
    if len(prompt_ids) < 2 or len(continuation_ids) < 1:
        raise ValueError(f"{len(prompt_ids)} prompt and {len(continuation_ids)} continuation tokens: need 2 and 1.")
    prompt = torch.tensor([list(prompt_ids)], device=model.device)
    given = torch.tensor([list(continuation_ids)[:-1]], device=model.device)
    with contextlib.ExitStack() as stack:
        trace = None if config is None else stack.enter_context(token_pruning(model, config, scorer))
        first = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        logits = first.logits[:, -1:]
        if given.shape[1]:
            # Positions said, not left to the cache's length: a KV-cache compression makes that shorter than the prompt.
            after = torch.arange(given.shape[1], device=given.device)[None] + len(prompt_ids)
            places = position_argument(model, after)
            rest = model(input_ids=given, past_key_values=first.past_key_values, use_cache=True, **places).logits
            logits = torch.cat([logits, rest], dim=1)
    return logits[0].float(), trace


def kl_divergence(full_logits: Tensor, pruned_logits: Tensor) -> float:
    """Mean over R of KL(full || pruned), nats a token, from logits (R, V)."""
    full, pruned = F.log_softmax(full_logits, dim=-1), F.log_softmax(pruned_logits, dim=-1)
    return F.kl_div(pruned, full, reduction="none", log_target=True).sum(-1).double().mean().item()


def mean_loss(logits: Tensor, token_ids: Sequence[int]) -> float:
    """Mean negative log-likelihood of ``token_ids`` (R,), nats a token."""
    return F.cross_entropy(logits, torch.tensor(list(token_ids), device=logits.device)).item()


def perplexity(losses: Sequence[float]) -> float:
    """exp of the mean of per-token losses in nats (of items of equal length)."""
    return math.exp(float(np.mean(losses)))


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], seed: int = 0, *, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of ``a - b`` over pairs, and its percentile bootstrap interval.

    Raises
    ------
    ValueError
        If the lists differ in length or are empty.
    """
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"paired values of length {len(a)} and {len(b)}: need as many of each, at least one.")
    differences = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    draws = np.random.default_rng(seed).integers(0, len(differences), size=(resamples, len(differences)))
    low, high = np.quantile(differences[draws].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(differences.mean()), float(low), float(high)


@dataclass(frozen=True)
class Method:
    """One line of a comparison.

    Attributes
    ----------
    name
        As rows and legends show it.
    scorer
        A scorer; or, with ``from_sample``, a function of (model, sample, layers) that returns one.
    config_for
        Turns the common config and the prompt's tokens into this method's own at equal cost; None: the common one.
    block
        ``"deployable"``, or ``"oracle"`` for scores that have seen the response.
    around
        Makes a context for its runs: what else this method does to the model (KV-cache compression, say).
    """

    name: str
    scorer: Any
    config_for: Callable[[PruningConfig, int], PruningConfig] | None = None
    block: str = "deployable"
    from_sample: bool = False
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


def baseline_methods(shape: ModelShape, *, recency_weight: float = 0.5) -> list[Method]:
    """The scores that need no training, at the same budget.

    The one-layer filter (GemFilter, FastKV) drops once, before a quarter of the layers, down to as many tokens as give
    the same causal prefill FLOPs; all others prune at the common stages, thus compute equal tokens in each layer.
    """
    mixed = scorers.weighted([(scorers.attention(8), 1.0), (scorers.recency(), recency_weight)])
    return [
        Method("random", scorers.random(0)),
        Method("recency", scorers.recency()),
        Method("hidden norm", scorers.hidden_norm()),
        Method("attention", scorers.attention(8)),
        Method("attention, pooled", scorers.attention(8, kernel=7)),
        Method("one-layer filter", scorers.attention(8, kernel=7), config_for=one_layer_config(shape)),
        Method("attention + recency", mixed),
    ]


def one_layer_config(shape: ModelShape, layer: int | None = None) -> Callable[[PruningConfig, int], PruningConfig]:
    """Configs with one stage, by default before a quarter of the layers, at the causal prefill FLOPs of another."""

    def config_for(config: PruningConfig, prompt_tokens: int) -> PruningConfig:
        single = config.replace(layers=(layer or max(1, shape.num_layers // 4),), keep_ratio=1.0)
        wanted = budget.speedup_limit(shape, config, prompt_tokens)
        return single.replace(keep_ratio=budget.find_keep_ratio(shape, single, prompt_tokens, speedup=wanted))

    return config_for


def oracle_methods(labels: Sequence[str] = ("gradient_x_hidden", "removal")) -> list[Method]:
    """Each label of `saliency` as a given score: what it would be worth if a pruner predicted it perfectly."""

    def known(label: str) -> Callable[..., Scorer]:
        def from_sample(model: Any, sample: Mapping[str, Any], layers: Sequence[int]) -> Scorer:
            return scorers.given(_labels(model, sample, layers, label))

        return from_sample

    return [Method(f"oracle: {label}", known(label), block="oracle", from_sample=True) for label in labels]


def _labels(model: Any, sample: Mapping[str, Any], layers: Sequence[int], label: str) -> dict[int, Tensor]:
    ids = torch.tensor([[*sample["prompt_ids"], *sample["response_ids"]]], device=model.device)
    response = torch.zeros_like(ids)
    response[:, len(sample["prompt_ids"]) :] = 1
    return saliency_of(model, ids, torch.ones_like(ids), response, layers, label)


def compare_scorers(
    model: Any,
    samples: Sequence[Mapping[str, Any]],
    configs: Mapping[str, PruningConfig],
    methods: Sequence[Method],
    writer: RowWriter,
    *,
    cell: str,
    progress: Callable[[str], None] | None = None,
) -> None:
    """One row for each (cell, sample, config, method) that ``writer`` does not have yet.

    A row has ``kl_nats`` (a token, to the unpruned model), ``loss_full_nats`` and ``loss_nats`` (a token),
    ``top1_agreement``, ``answer_full`` and ``answer`` (whether greedy decoding gives the answer's tokens; samples with
    an ``answer_mask`` only), ``compression_ratio``, ``prefill_flops_share`` (of unpruned, the pruners' own not
    counted), ``kv_bytes`` of the prompt's cache and ``seconds``. The unpruned logits are computed once a sample. What
    fails is a row of kind ``failure``.
    """
    shape = ModelShape.from_config(model.config)
    for sample in samples:
        prompt, response = sample["prompt_ids"], sample["response_ids"]
        todo = [
            (f"{cell}|{sample['id']}|{config_name}|{method.name}", config_name, config, method)
            for method in methods
            for config_name, config in configs.items()
        ]
        todo = [item for item in todo if not writer.done(item[0])]
        if not todo:
            continue
        full = None
        made: dict[str, Scorer] = {}
        for key, config_name, config, method in todo:
            labels = {"cell": cell, "sample": sample["id"], "setting": config_name, "scorer": method.name}
            labels |= {"block": method.block, "category": sample["category"], "prompt_tokens": len(prompt)}
            started = time.perf_counter()
            try:
                if full is None:
                    full, _ = continuation_logits(model, prompt, response)
                if method.name not in made:
                    every_layer = sorted({layer for c in configs.values() for layer in c.layers})
                    made[method.name] = (
                        method.scorer(model, sample, every_layer) if method.from_sample else method.scorer
                    )
                used = method.config_for(config, len(prompt)) if method.config_for else config
                with method.around():
                    logits, trace = continuation_logits(model, prompt, response, used, made[method.name])
                measured = _compared(full, logits, sample) | {
                    "compression_ratio": trace.compression_ratio,
                    "prefill_flops_share": budget.prefill_flops(shape, trace.tokens_per_layer)
                    / budget.prefill_flops(shape, [len(prompt)] * shape.num_layers),
                    "kv_bytes": sum(trace.kv_bytes_per_layer),
                    "keep_ratio": used.keep_ratio,
                    "stages": len(used.layers),
                    "seconds": time.perf_counter() - started,
                }
                writer.add(key, kind="scorer", **labels, **measured)
            except (RuntimeError, ValueError, MemoryError) as error:
                writer.add(key, kind="failure", **labels, error=f"{type(error).__name__}: {str(error)[:300]}")
        if progress is not None:
            progress(f"{cell} {sample['id']}")


def _compared(full: Tensor, logits: Tensor, sample: Mapping[str, Any]) -> dict[str, Any]:
    response = sample["response_ids"]
    fields: dict[str, Any] = {
        "kl_nats": kl_divergence(full, logits),
        "loss_full_nats": mean_loss(full, response),
        "loss_nats": mean_loss(logits, response),
        "response_tokens": len(response),
        "top1_agreement": (full.argmax(-1) == logits.argmax(-1)).double().mean().item(),
    }
    if "answer_mask" in sample:
        at = torch.tensor(sample["answer_mask"], device=logits.device)
        wanted = torch.tensor(response, device=logits.device)[at]
        fields["answer_full"] = bool((full[at].argmax(-1) == wanted).all())
        fields["answer"] = bool((logits[at].argmax(-1) == wanted).all())
    return fields
