"""Variants compared with the unpruned model, one row per sample: divergence, loss, answers, tokens, bytes.

Takes any `methods.variant.Variant`; which ones exist, and how rows are drawn, is not known here.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sdtp_lib import budget
from sdtp_lib.architectures.caches import kv_bytes
from sdtp_lib.config import PruningConfig
from sdtp_lib.evaluation.divergence import kl_divergence, logits_along, mean_loss
from sdtp_lib.methods import SpeedupOutOfReach
from sdtp_lib.methods.variant import UNPRUNED, Variant
from sdtp_lib.model_shape import ModelShape
from sdtp_lib.pruning.trace import PruningTrace
from sdtp_lib.records import RowWriter, content_id

LOSSLESS_PERPLEXITY_PERCENT = 5.0


def compare_scorers(
    model: Any,
    samples: Sequence[Mapping[str, Any]],
    configs: Mapping[str, PruningConfig],
    methods: Sequence[Variant],
    writer: RowWriter,
    *,
    test_set: str,
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
    ids = writer.scored_by({each.name: each.budget if each.scorer is None else each.scorer for each in methods})
    layers = sorted({layer for config in configs.values() for layer in config.layers})
    for sample in samples:
        measure, todo = _measure_on(model, sample, layers), []
        for method in methods:
            for name, config in configs.items():
                key = f"{test_set}|{sample['id']}|{name}|{method.name}"
                made_from = {"sample_hash": sample_hash(sample), "config_hash": content_id(config.to_dict())}
                if not writer.done(key, **made_from):
                    labels = {"cell": test_set, "sample": sample["id"], "setting": name, "scorer": method.name}
                    labels |= {"scorer_id": ids[method.name], **made_from, "block": method.kind or "deployable"}
                    labels |= {"category": sample["category"], "prompt_tokens": len(sample["prompt_ids"])}
                    todo.append((key, labels, functools.partial(measure, method, config)))
        if todo:
            add_rows(writer, todo, kind="scorer")
            if progress is not None:
                progress(f"{test_set} {sample['id']}")


def _measure_on(
    model: Any, sample: Mapping[str, Any], layers: Sequence[int]
) -> Callable[[Variant, PruningConfig], dict[str, Any]]:
    """Measures a method on ``sample`` at the cost of a config; what all need is computed once, when first asked for."""
    prompt, shape = len(sample["prompt_ids"]), ModelShape.from_model(model)
    whole = budget.prefill_flops(shape, [prompt] * shape.num_layers)
    unpruned = functools.cache(lambda: on_sample(model, sample, Variant(UNPRUNED))[1])
    scorer_from_sample = functools.cache(lambda make: make(model, sample, layers))

    def measure(method: Variant, config: PruningConfig) -> dict[str, Any]:
        started, full = time.perf_counter(), unpruned()
        if method.from_sample:
            method = dataclasses.replace(method, scorer=scorer_from_sample(method.scorer))
        variant = method.at(model, config, prompt)
        found, _, trace = on_sample(model, sample, variant, full)
        used = variant.config(model, prompt)
        return found | {
            "compression_ratio": trace.compression_ratio,
            "prefill_flops_share": variant.flops(model, prompt, trace.tokens_per_layer) / whole,
            "keep_ratio": used.keep_ratio,
            "stages": len(used.layers),
            "seconds": time.perf_counter() - started,
        }

    return measure


def add_rows(
    writer: RowWriter, todo: Iterable[tuple[str, Mapping[str, Any], Callable[[], dict[str, Any]]]], *, kind: str
) -> list[dict[str, Any]]:
    """Measure and append row by row: the loop of every comparison. Returns the rows of what could be measured.

    Parameters
    ----------
    todo
        Key, labels and what gives the measured fields. Where that raises, the row is of kind ``failure``, which the
        next run tries again, or ``out of reach`` where a speed-up cannot be had.
    """
    found = []
    for key, labels, measure in todo:
        try:
            found.append(writer.add(key, kind=kind, **labels, **measure()))
        except SpeedupOutOfReach as error:
            writer.add(key, kind="out of reach", **labels, error=str(error)[:300])
        except (RuntimeError, ValueError, MemoryError) as error:
            writer.add(key, kind="failure", **labels, error=f"{type(error).__name__}: {str(error)[:300]}")
    return found


def on_sample(
    model: Any, sample: Mapping[str, Any], variant: Variant, full: Tensor | None = None, watch: Any = None
) -> tuple[dict[str, Any], Tensor, PruningTrace | None]:
    """Prefill a sample's prompt under ``variant`` and predict its response from the cache.

    Parameters
    ----------
    full : Tensor (R, V), optional
        The unpruned model's logits, to compare with.
    watch
        A running `latency.measure.Stopwatch`, for ``prefill_ms``; entering the ``with`` counts.

    Returns
    -------
    fields, logits (R, V), trace
        ``kv_bytes`` of the prompt's cache, ``prefill_ms``, and what `compared` says.
    """
    found: dict[str, Any] = {}

    def prefilled(cache: Any) -> None:
        if watch is not None:
            watch.mark("prefill")
        found["kv_bytes"] = sum(kv_bytes(cache))

    with variant.applied(model) as trace:
        logits = logits_along(model, sample["prompt_ids"], sample["response_ids"], prefilled=prefilled)
    if watch is not None:
        found["prefill_ms"] = watch.parts_ms()["prefill"]
    return found | (compared(full, logits, sample) if full is not None else {}), logits, trace


def sample_hash(sample: Mapping[str, Any]) -> str:
    """What the field of this name says in the rows of a sample."""
    return content_id(sample["prompt_ids"], sample["response_ids"])


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
