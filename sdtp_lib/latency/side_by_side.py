"""Every score and method that `token_pruning` takes, compared with the unpruned model on a person's own prompts.

All choices of a comparison cost the same prefill FLOPs on each prompt. What is compared: the next-token distributions
along the unpruned model's own answer, that answer, the time to the first token, and the cache. Knows no file and no
picture.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any

import torch

from sdtp_lib import methods
from sdtp_lib.architectures.layers import num_layers
from sdtp_lib.evaluation.compare import on_sample
from sdtp_lib.evaluation.divergence import kl_divergence
from sdtp_lib.latency.generation import end_tokens, prefill_and_decode
from sdtp_lib.latency.measure import Stopwatch
from sdtp_lib.methods.call import config_of, speedup_in
from sdtp_lib.methods.variant import UNPRUNED, Variant
from sdtp_lib.scorers.found import every_pruners_for
from sdtp_lib.scorers.simple import NAMED

# This project's own: the pruners at hand and the training-free scores are its lines.
_OURS = {"sdtp", "sdtp-low", "sdtp-fast"}


def choices(model: Any, budget: str | float) -> list[Variant]:
    """Pruners made for this model that fit ``budget``, every training-free score, and every published method.

    `Variant.at` gives each the FLOPs of ``budget``. A wanted speed-up leaves each its own schedule; a preset or a ratio
    gives the scores that of the preset, and the methods as many FLOPs by their own.
    """
    layers = None if speedup_in(budget) is not None else config_of(budget, num_layers(model)).layers
    found = [Variant(name, scorer=pruners, kind="pruners") for name, pruners in every_pruners_for(model, layers)]
    found += [Variant(name, scorer=make(), kind="training-free") for name, make in NAMED.items()]
    return found + [Variant(name, methods.get(name), kind="method") for name in methods.names() if name not in _OURS]


def side_by_side(
    model: Any,
    prompts: Mapping[str, Sequence[int]],
    budget: str | float,
    found: Sequence[Variant],
    *,
    new_tokens: int = 32,
    repeats: int = 3,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """One row per prompt and choice, the unpruned model's first.

    Parameters
    ----------
    prompts
        Name -> token ids.
    budget, found
        What all cost, and the choices.
    new_tokens
        Longest answer of the unpruned model, along which distributions are compared.
    repeats
        Timed prefills, in turn with the other choices', after one that is not timed.
    progress
        Told what begins, `steps` times: each choice of a prompt, and each repetition of its timed prefills.

    Returns
    -------
    list of dict
        ``prompt, prompt_tokens, choice, kind, kl_nats`` (per token), ``same_answer``, ``answer_ids``, ``prefill_ms``
        (median), ``prefill_speedup`` (median of paired ratios), ``kv_bytes`` of the prompt; or ``refused``, the reason.
    """
    ends, unpruned = end_tokens(model), Variant(UNPRUNED, kind=UNPRUNED)
    rows = []
    for name, ids in prompts.items():
        input_ids = torch.tensor([list(ids)], device=model.device)
        answer = prefill_and_decode(model, input_ids, new_tokens, ends=ends).token_ids[0].tolist()
        sample = {"prompt_ids": ids, "response_ids": answer}
        row, full, _ = on_sample(model, sample, unpruned)
        measured = {UNPRUNED: row | {"kl_nats": 0.0, "same_answer": True, "answer_ids": answer}}
        timed = [unpruned]
        for choice in found:
            if progress:
                progress(f"{name}: {choice.name}")
            try:
                variant = choice.at(model, budget, len(ids))
                row, logits, _ = on_sample(model, sample, variant)
                with variant.applied(model):
                    own = prefill_and_decode(model, input_ids, new_tokens, ends=ends).token_ids[0].tolist()
                row |= {"kl_nats": kl_divergence(full, logits), "same_answer": own == answer, "answer_ids": own}
                measured[choice.name] = row
                timed.append(variant)
            except (ValueError, RuntimeError, MemoryError) as error:
                measured[choice.name] = {"refused": " ".join(str(error).split()) or type(error).__name__}
        times: dict[str, list[float]] = {variant.name: [] for variant in timed}
        for repetition in range(repeats):
            if progress:
                progress(f"{name}: timed prefills, {repetition + 1} of {repeats}")
            turn = repetition % len(timed)
            for variant in timed[turn:] + timed[:turn]:
                times[variant.name].append(_prefill_ms(model, variant, input_ids))
        for choice in (unpruned, *found):
            row = {"prompt": name, "prompt_tokens": len(ids), "choice": choice.name, "kind": choice.kind}
            if own_ms := times.get(choice.name):
                row["prefill_ms"] = statistics.median(own_ms)
                row["prefill_speedup"] = statistics.median(a / b for a, b in zip(times[UNPRUNED], own_ms, strict=True))
            rows.append(row | measured[choice.name])
    return rows


def steps(prompts: Sized, found: Sized, repeats: int) -> int:
    """How often `side_by_side` tells its progress."""
    return len(prompts) * (len(found) + repeats)


def _prefill_ms(model: Any, variant: Variant, input_ids: torch.Tensor) -> float:
    """Milliseconds to the first token; entering the ``with`` counts, since a user pays for it too."""
    watch = Stopwatch(input_ids.device)
    with variant.applied(model):
        return prefill_and_decode(model, input_ids, 1, watch).fields()["ttft_ms"]


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line per choice over the prompts that none of them refused for this choice: means, and sums as ratios.

    ``choice, kind, prompts, kl_nats, same_answers, prefill_ms, prefill_speedup, kv_share``; the unpruned model first,
    then by KL. A choice that was refused everywhere has no line.
    """
    full = {row["prompt"]: row for row in rows if row["choice"] == UNPRUNED}
    lines = []
    for name in dict.fromkeys(row["choice"] for row in rows):
        own = [row for row in rows if row["choice"] == name and "refused" not in row]
        if not own:
            continue
        beside = [full[row["prompt"]] for row in own]
        lines.append(
            {
                "choice": name,
                "kind": own[0]["kind"],
                "prompts": len(own),
                "kl_nats": statistics.fmean(row["kl_nats"] for row in own),
                "same_answers": sum(row["same_answer"] for row in own),
                "prefill_ms": statistics.fmean(row["prefill_ms"] for row in own),
                "prefill_speedup": statistics.fmean(row["prefill_speedup"] for row in own),
                "kv_share": sum(row["kv_bytes"] for row in own) / sum(row["kv_bytes"] for row in beside),
            }
        )
    return sorted(lines, key=lambda line: (line["choice"] != UNPRUNED, line["kl_nats"]))


def refusals(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Choice -> why it was refused on some prompt."""
    return {row["choice"]: row["refused"] for row in rows if "refused" in row}
