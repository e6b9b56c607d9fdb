"""Generated answers, full and pruned: one row per item and variant, by one loop for all benchmarks (see `items`).

A killed run goes on where it stopped; an item that fails is a row of kind ``failure``. Greedy decoding through the
engine: the pruned cache of the prefill is the one that decode and a second turn extend.
"""

from __future__ import annotations

import base64
import itertools
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from sdtp_lib.architectures.caches import cache_argument, cache_in
from sdtp_lib.architectures.layers import pad_left
from sdtp_lib.evaluation.items import Item
from sdtp_lib.methods.variant import Variant
from sdtp_lib.model_shape import positions
from sdtp_lib.pruning.token_fates import TokenFates
from sdtp_lib.pruning.trace import PruningTrace
from sdtp_lib.records import RowWriter, content_id

FULL = "full"


def run_items(
    model: Any,
    tokenizer: Any,
    items: Iterable[Item],
    variants: Sequence[Variant],
    writer: RowWriter,
    *,
    batch_size: int = 1,
    progress: Callable[[Item], None] | None = None,
) -> None:
    """One row for each item and variant that ``writer`` does not have yet.

    ``OtherProvenance`` where ``writer`` has rows of these names that another scorer, prompt or pruning config made.

    A row has ``dataset, item, variant, prompt_tokens, was_cut, prediction, score, new_tokens, batch, prefill_seconds``
    (the time to the first token), ``generate_seconds`` (end to end; both of the row's whole batch), ``tokens_per_layer,
    compression_ratio``, for pruned variants ``dropped_at`` (see `token_fates`), and the item's labels. An item with a
    second turn has ``first_prediction`` and ``first_score`` too, and its end-to-end time is that of both turns.

    ``batch_size`` prompts of like lengths and equal rules are answered together, padded on the left; a batch that
    fails is tried again item by item.
    """
    ids = writer.scored_by({variant.name: variant.scorer for variant in variants})
    for batch in _batches(items, batch_size):
        for variant in variants:
            todo = [item for item in batch if not writer.done(_key(item, variant), **_made_from(item, variant))]
            if todo:
                _add_answers(model, tokenizer, todo, variant, ids[variant.name], writer)
        if progress is not None:
            for item in batch:
                progress(item)


def _key(item: Item, variant: Variant) -> str:
    return f"{item.dataset}|{item.identifier}|{variant.name}"


def _made_from(item: Item, variant: Variant) -> dict[str, str]:
    config = variant.budget.to_dict() if hasattr(variant.budget, "to_dict") else variant.budget
    rules = [item.max_new_tokens, item.stop_ids, *([item.follow_up_ids] if item.follow_up_ids else [])]
    sample = content_id(item.prompt_ids, *rules)
    return {"sample_hash": sample, "config_hash": content_id(config)}


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Items in their order; for ``size`` above 1 by length within some dozens, so that little of a batch is padding."""
    if size == 1:
        yield from ([item] for item in items)
        return

    def rules(item: Item) -> tuple[bool, int, tuple[int, ...]]:
        return bool(item.follow_up_ids), item.max_new_tokens, item.stop_ids

    source = iter(items)
    while some := list(itertools.islice(source, 16 * size)):
        some.sort(key=lambda item: (*rules(item), len(item.prompt_ids)))
        for (second_turn, *_), alike in itertools.groupby(some, key=rules):
            # First answers end at different places, so that second turns do not stand side by side.
            batched, together = list(alike), 1 if second_turn else size
            yield from (batched[first : first + together] for first in range(0, len(batched), together))


def _add_answers(
    model: Any, tokenizer: Any, items: Sequence[Item], variant: Variant, scorer_id: str | None, writer: RowWriter
) -> None:
    labels = {item.identifier: _labels(item, variant) | {"scorer_id": scorer_id} for item in items}
    try:
        answers = _answered(model, tokenizer, items, variant)
    except (RuntimeError, ValueError, MemoryError) as error:
        if len(items) > 1:
            for item in items:
                _add_answers(model, tokenizer, [item], variant, scorer_id, writer)
            return
        (item,) = items
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        writer.add(_key(item, variant), kind="failure", **labels[item.identifier], error=reason)
        return
    for item, answer in zip(items, answers, strict=True):
        writer.add(_key(item, variant), kind="item", **labels[item.identifier], **answer)


def _labels(item: Item, variant: Variant) -> dict[str, Any]:
    names = {"dataset": item.dataset, "item": item.identifier, "variant": variant.name}
    counted = {"prompt_tokens": len(item.prompt_ids), "was_cut": item.cut}
    return {**item.labels, **names, **counted, **_made_from(item, variant)}


class _FirstToken:
    """A streamer that only looks at the clock: `generate` hands it the prompt, then token by token."""

    def __init__(self) -> None:
        self.calls, self.first_at = 0, 0.0

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 2:
            self.first_at = time.perf_counter()

    def end(self) -> None:
        """Nothing is held back."""


@torch.no_grad()
def _answered(model: Any, tokenizer: Any, items: Sequence[Item], variant: Variant) -> list[dict[str, Any]]:
    """The measured fields of each item, all generated in one batch."""
    limit, layers = positions(model), model.config.get_text_config().num_hidden_layers
    longest, new_tokens = max(len(item.prompt_ids) for item in items), items[0].max_new_tokens
    follow_up = items[0].follow_up_ids
    if follow_up:
        new_tokens = 2 * new_tokens + len(follow_up)
    if limit is not None and longest + new_tokens > limit:
        raise ValueError(
            f"{longest} prompt and {new_tokens} new tokens are more than the model's {limit} positions: lower the "
            "prompt limit."
        )
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    filler = ends[0] if ends else 0
    ends += items[0].stop_ids
    settings = {"max_new_tokens": items[0].max_new_tokens, "min_new_tokens": 1, "do_sample": False}
    settings |= {"eos_token_id": ends or None, "pad_token_id": filler, "return_dict_in_generate": True}
    ids, mask = (tensor.to(model.device) for tensor in pad_left([item.prompt_ids for item in items]))
    clock, first = _FirstToken(), {}
    started = time.perf_counter()
    with variant.applied(model) as trace:
        output = model.generate(ids, attention_mask=mask, streamer=clock, **settings)
        new_from = longest
        if follow_up:
            first = {"first_prediction": tokenizer.decode(output.sequences[0, longest:], skip_special_tokens=True)}
            if items[0].first_score is not None:
                first["first_score"] = items[0].first_score(first["first_prediction"])
            ids = _next_turn(output.sequences, follow_up)
            new_from = ids.shape[1]
            settings |= cache_argument(model, cache_in(output))
            output = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    seconds = time.perf_counter() - started
    times = first | {"batch": len(items), "prefill_seconds": clock.first_at - started, "generate_seconds": seconds}
    answers = []
    for row, item in enumerate(items):
        new_ids = _up_to_its_end(output.sequences[row, new_from:].tolist(), ends)
        prediction = tokenizer.decode(new_ids, skip_special_tokens=True)
        answer = {"prediction": prediction, "score": item.score(prediction), "new_tokens": len(new_ids)} | times
        answers.append(answer | _kept(trace, row, len(item.prompt_ids), layers))
    return answers


def _next_turn(sequences: torch.Tensor, follow_up: tuple[int, ...]) -> torch.Tensor:
    """All that was said (1, T) and the next turn, whose end-of-turn token the first answer may have given already."""
    turn = follow_up[1:] if int(sequences[0, -1]) == follow_up[0] else follow_up
    return torch.cat([sequences, torch.tensor([turn], device=sequences.device)], dim=1)


def _up_to_its_end(new_ids: list[int], ends: Sequence[int]) -> list[int]:
    """What a row generated, its end token included; what stands after it only fills the batch."""
    for place, token in enumerate(new_ids):
        if token in ends:
            return new_ids[: place + 1]
    return new_ids


def _kept(trace: PruningTrace | None, row: int, tokens: int, layers: int) -> dict[str, Any]:
    if trace is None:
        return {"tokens_per_layer": [tokens] * layers, "compression_ratio": 1.0}
    counts = trace.tokens_per_row[:, row].tolist()
    packed = _packed(trace, row, tokens, len(counts))
    return {
        "tokens_per_layer": counts,
        "compression_ratio": tokens * len(counts) / sum(counts),
        "dropped_at": packed,
    }


def token_fates(packed: str, layers: Sequence[int], num_layers: int) -> TokenFates:
    """What became of each prompt token, from the field ``dropped_at`` of a row; scores are not kept in rows."""
    fate = np.frombuffer(zlib.decompress(base64.b64decode(packed)), dtype=np.int16).astype(np.int64)
    return TokenFates(fate, tuple(layers), num_layers, np.full((len(layers), len(fate)), np.nan))


def _packed(trace: PruningTrace, row: int, tokens: int, num_layers: int) -> str:
    """Compressed: a prompt of 8,192 tokens as a list of numbers would be 30 kB in every row."""
    fate = np.full(tokens, num_layers, dtype=np.int16)
    left = np.ones(tokens, dtype=bool)
    for layer in sorted(trace.kept_positions):
        kept = np.zeros(tokens, dtype=bool)
        positions = trace.kept_positions[layer][row].cpu().numpy()
        kept[positions[positions >= 0]] = True
        fate[left & ~kept] = layer
        left = kept
    return base64.b64encode(zlib.compress(fate.tobytes(), 9)).decode()
