"""Pruning methods compared with the unpruned model, one row per sample: divergence, loss, answers, tokens, bytes.

Takes any `methods.Compared`; which ones exist, and how rows are drawn, is not known here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sdtp_lib import budget
from sdtp_lib.config import PruningConfig
from sdtp_lib.evaluation.divergence import continuation_logits, kl_divergence, mean_loss
from sdtp_lib.evaluation.methods import Compared
from sdtp_lib.methods import Method, SpeedupOutOfReach
from sdtp_lib.model_shape import ModelShape
from sdtp_lib.pruning.stage import Scorer
from sdtp_lib.records import RowWriter, content_id

LOSSLESS_PERPLEXITY_PERCENT = 5.0


def compare_scorers(
    model: Any,
    samples: Sequence[Mapping[str, Any]],
    configs: Mapping[str, PruningConfig],
    methods: Sequence[Compared],
    writer: RowWriter,
    *,
    cell: str,
    progress: Callable[[str], None] | None = None,
) -> None:
    """One row per test set (``cell``), sample, config and method, of those that ``writer`` does not have yet.

    A row has ``kl_nats`` (per token, to the unpruned model), ``loss_full_nats`` and ``loss_nats`` (per token),
    ``top1_agreement``, ``answer_full`` and ``answer`` (whether greedy decoding gives the answer's tokens; samples with
    an ``answer_mask`` only), ``compression_ratio``, ``prefill_flops_share`` (of unpruned, the pruners' own not
    counted), ``kv_bytes`` of the prompt's cache and ``seconds``. The unpruned logits are computed once per sample. A
    failure is a row of kind ``failure``; a published method that cannot reach the wanted speed-up has one of kind ``out
    of reach``.

    Raises
    ------
    OtherProvenance
        Before anything is computed: ``writer`` has rows of these names that another scorer made, or of these keys that
        another prompt or pruning config made.
    """
    ids = writer.scored_by({method.name: method.scorer for method in methods})
    shape = ModelShape.from_model(model)
    for sample in samples:
        prompt, response = sample["prompt_ids"], sample["response_ids"]
        todo = [
            (f"{cell}|{sample['id']}|{config_name}|{method.name}", config_name, config, method)
            for method in methods
            for config_name, config in configs.items()
        ]
        made_from = {name: {"sample_hash": content_id(prompt, response), "config_hash": content_id(config.to_dict())}
                     for name, config in configs.items()}  # fmt: skip
        todo = [item for item in todo if not writer.done(item[0], **made_from[item[1]])]
        if not todo:
            continue
        full = None
        made: dict[str, Scorer] = {}
        for key, config_name, config, method in todo:
            labels = {"cell": cell, "sample": sample["id"], "setting": config_name, "scorer": method.name}
            labels |= {"scorer_id": ids[method.name], **made_from[config_name]}
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
                published = used if isinstance(used, Method) else None
                if published is not None:
                    used = published.budget_for(model).for_prompt(len(prompt))
                with method.around():
                    logits, trace = continuation_logits(
                        model, prompt, response, published or used, None if published else made[method.name]
                    )
                computed = trace.tokens_per_layer
                flops = (
                    published.flops_of(model, len(prompt), computed)
                    if published
                    else budget.prefill_flops(shape, computed)
                )
                measured = compared(full, logits, sample) | {
                    "compression_ratio": trace.compression_ratio,
                    "prefill_flops_share": flops / budget.prefill_flops(shape, [len(prompt)] * shape.num_layers),
                    "kv_bytes": sum(trace.kv_bytes_per_layer),
                    "keep_ratio": used.keep_ratio,
                    "stages": len(used.layers),
                    "seconds": time.perf_counter() - started,
                }
                writer.add(key, kind="scorer", **labels, **measured)
            except SpeedupOutOfReach as error:
                writer.add(key, kind="out of reach", **labels, error=str(error)[:300])
            except (RuntimeError, ValueError, MemoryError) as error:
                writer.add(key, kind="failure", **labels, error=f"{type(error).__name__}: {str(error)[:300]}")
        if progress is not None:
            progress(f"{cell} {sample['id']}")


def compared(full: Tensor, logits: Tensor, sample: Mapping[str, Any]) -> dict[str, Any]:
    """KL, losses and agreement from logits (R, V); for a sample with an ``answer_mask``, also whether it is right."""
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
