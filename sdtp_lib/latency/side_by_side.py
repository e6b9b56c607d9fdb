"""Every budget and scorer that `token_pruning` takes, compared with the unpruned model on a person's own prompts.

A *choice* is a budget and a scorer under one name. All choices of a comparison cost the same prefill FLOPs on each
prompt. What is compared: the next-token distributions along the unpruned model's own answer, that answer, the time to
the first token, and the cache. Knows no file and no picture.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sdtp_lib import budget as counting
from sdtp_lib import methods
from sdtp_lib.architectures.caches import kv_bytes
from sdtp_lib.architectures.layers import num_layers
from sdtp_lib.evaluation.divergence import kl_divergence
from sdtp_lib.latency.generation import end_tokens, plain_prefill, prefill_and_decode
from sdtp_lib.latency.measure import Stopwatch
from sdtp_lib.latency.methods import plain_step_all
from sdtp_lib.methods.call import config_of, speedup_in, token_pruning
from sdtp_lib.model_shape import ModelShape
from sdtp_lib.scorers.found import every_pruners_for
from sdtp_lib.scorers.simple import NAMED

UNPRUNED = "unpruned"
# This project's own: the pruners at hand and the training-free scores are its lines.
_OURS = {"sdtp", "sdtp-low"}


@dataclass(frozen=True)
class Choice:
    """One line of a comparison.

    Attributes
    ----------
    name, kind
        As tables show it; ``"pruners"``, ``"training-free"`` or ``"method"``.
    budget_for
        Prompt tokens -> the budget that `token_pruning` takes.
    scorer
        What it takes for a scorer.
    remark
        What a table must say of it.
    """

    name: str
    kind: str
    budget_for: Callable[[int], Any]
    scorer: Any = None
    remark: str = ""


def choices(model: Any, budget: str | float) -> list[Choice]:
    """Pruners made for this model, every training-free score, and every published method, at the FLOPs of ``budget``.

    A wanted speed-up leaves each its own schedule; a preset or a ratio gives the scores that of the preset, and the
    methods as many FLOPs by their own.
    """
    speedup = speedup_in(budget)
    config = None if speedup is not None else config_of(budget, num_layers(model))
    found = [
        Choice(name, "pruners", lambda _tokens: budget, pruners)
        for name, pruners in every_pruners_for(model, None if config is None else config.layers)
    ]
    found += [Choice(name, "training-free", lambda _tokens: budget, make()) for name, make in NAMED.items()]

    def speedup_at(tokens: int) -> float:
        return speedup or round(counting.speedup_limit(ModelShape.from_model(model), config, tokens, pruner_width=0), 3)

    return found + [
        Choice(
            name, "method", lambda tokens, name=name: methods.get(name).at_speedup(speedup_at(tokens)),
            remark=methods.get(name).remark,
        )  # fmt: skip
        for name in methods.names()
        if name not in _OURS
    ]


def side_by_side(
    model: Any,
    prompts: Mapping[str, Sequence[int]],
    found: Sequence[Choice],
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
    new_tokens
        Longest answer of the unpruned model, along which distributions are compared.
    repeats
        Timed prefills, in turn with the other choices', after one that is not timed.

    Returns
    -------
    list of dict
        ``prompt, prompt_tokens, choice, kind, kl_nats`` (per token), ``same_answer``, ``answer_ids``, ``prefill_ms``
        (median), ``prefill_speedup`` (median of paired ratios), ``kv_bytes`` of the prompt; or ``refused``, the reason.
    """
    ends = end_tokens(model)
    rows = []
    for name, ids in prompts.items():
        input_ids = torch.tensor([list(ids)], device=model.device)
        answer = prefill_and_decode(model, input_ids, new_tokens, ends=ends).token_ids
        unpruned = Choice(UNPRUNED, UNPRUNED, lambda _tokens: None)
        full, row = _first(model, unpruned, input_ids, answer)
        measured = {UNPRUNED: row | {"kl_nats": 0.0, "same_answer": True, "answer_ids": answer[0].tolist()}}
        times: dict[str, list[float]] = {UNPRUNED: []}
        for choice in found:
            if progress:
                progress(f"{name}: {choice.name}")
            try:
                logits, row = _first(model, choice, input_ids, answer)
                with _pruned(model, choice, len(ids)):
                    own = prefill_and_decode(model, input_ids, new_tokens, ends=ends).token_ids
                row |= {"kl_nats": kl_divergence(full, logits), "same_answer": torch.equal(own, answer)}
                row["answer_ids"] = own[0].tolist()
                measured[choice.name], times[choice.name] = row, []
            except (ValueError, RuntimeError, MemoryError) as error:
                measured[choice.name] = {"refused": " ".join(str(error).split()) or type(error).__name__}
        timed = [choice for choice in (unpruned, *found) if choice.name in times]
        for repetition in range(repeats):
            turned = timed[repetition % len(timed) :] + timed[: repetition % len(timed)]
            for choice in turned:
                times[choice.name].append(_prefill_ms(model, choice, input_ids))
        for choice in (unpruned, *found):
            row = {"prompt": name, "prompt_tokens": len(ids), "choice": choice.name, "kind": choice.kind}
            if own_ms := times.get(choice.name):
                row["prefill_ms"] = statistics.median(own_ms)
                row["prefill_speedup"] = statistics.median(a / b for a, b in zip(times[UNPRUNED], own_ms, strict=True))
            rows.append(row | measured[choice.name])
    return rows


@contextlib.contextmanager
def _pruned(model: Any, choice: Choice, prompt_tokens: int):
    budget = choice.budget_for(prompt_tokens)
    if budget is None:
        yield
    else:
        with token_pruning(model, budget, choice.scorer):
            yield


def _first(
    model: Any, choice: Choice, input_ids: torch.Tensor, answer: torch.Tensor
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Logits (R, V) along the answer (1, R), and the bytes of the prompt's cache."""
    with torch.inference_mode(), _pruned(model, choice, input_ids.shape[1]):
        logits, cache = plain_prefill(model, input_ids)
        held = sum(kv_bytes(cache))
        rows = [logits[0, -1:].float()]
        if answer.shape[1] > 1:
            rows.append(plain_step_all(model, answer[:, :-1], cache)[0][0].float())
    return torch.cat(rows), {"kv_bytes": held}


def _prefill_ms(model: Any, choice: Choice, input_ids: torch.Tensor) -> float:
    """Milliseconds to the first token; entering the ``with`` counts, since a user pays for it too."""
    watch = Stopwatch(input_ids.device)
    with torch.inference_mode(), _pruned(model, choice, input_ids.shape[1]):
        plain_prefill(model, input_ids)[0][:, -1].argmax(dim=-1)
        watch.mark("prefill")
    return sum(watch.parts_ms().values())


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
