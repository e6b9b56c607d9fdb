"""Generated answers, full and pruned: one row an item and variant, for LongBench and the synthetic tasks alike.

An item is a tokenised prompt with its rules and a scoring function. A killed run goes on where
it stopped; an item that fails is a row of kind ``failure``. Greedy decoding through the engine: the pruned cache of the
prefill is the one that decode extends.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sdtp_lib.config import PruningConfig
from sdtp_lib.data import longbench, tasks
from sdtp_lib.data.samples import tokenise_prompt
from sdtp_lib.pruning.engine import token_pruning
from sdtp_lib.pruning.stage import Scorer
from sdtp_lib.pruning.token_fates import TokenFates
from sdtp_lib.pruning.trace import PruningTrace
from sdtp_lib.records import RowWriter, content_id

FULL = "full"


@dataclass(frozen=True)
class Item:
    """A prompt to answer.

    Attributes
    ----------
    dataset, identifier
        Together they name the item in rows.
    prompt_ids
        The prompt as it is fed to the model.
    max_new_tokens, stop_ids
        Decoding ends there, besides at the model's own end tokens.
    score
        From the generated text to 0 .. 1.
    cut
        Whether the middle of the prompt was cut out to fit.
    """

    dataset: str
    identifier: str
    prompt_ids: Sequence[int]
    max_new_tokens: int
    score: Callable[[str], float]
    stop_ids: tuple[int, ...] = ()
    cut: bool = False


@dataclass(frozen=True)
class Variant:
    """A way to run the prefill: pruned by ``scorer`` under ``config``, or unpruned where both are None."""

    name: str
    config: PruningConfig | None = None
    scorer: Scorer | None = None


def longbench_items(records: Iterable[Mapping[str, Any]], tokenizer: Any, *, max_tokens: int) -> Iterable[Item]:
    """Items by the official protocol (see `longbench`), made one by one."""
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]
    for record in records:
        rules = longbench.task(record["dataset"])
        ids, cut = longbench.build_prompt(record, tokenizer, max_tokens)
        yield Item(
            dataset=record["dataset"],
            identifier=record["_id"],
            prompt_ids=ids,
            max_new_tokens=rules.max_new_tokens,
            score=lambda prediction, record=record: longbench.score(record, prediction),
            stop_ids=tuple(newline) if rules.stop_at_newline else (),
            cut=cut,
        )


def synthetic_items(records: Iterable[Mapping[str, Any]], tokenizer: Any) -> Iterable[Item]:
    """Items of the synthetic tasks (see `tasks`)."""
    for record in records:
        chat = record["dataset"] not in tasks.UNCHATTED
        yield Item(
            dataset=record["dataset"],
            identifier=record["_id"],
            prompt_ids=tokenise_prompt(tokenizer, tasks.as_prompt(record, tokenizer), chat=chat),
            max_new_tokens=tasks.MOST_NEW_TOKENS[record["dataset"]],
            score=lambda prediction, record=record: tasks.score(record, prediction),
        )


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
    (to the first token), ``generate_seconds`` (both of the row's whole batch), and for pruned variants
    ``tokens_per_layer, compression_ratio, dropped_at`` (see `token_fates`).

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
    config = variant.config and variant.config.to_dict()
    sample = content_id(item.prompt_ids, item.max_new_tokens, item.stop_ids)
    return {"sample_hash": sample, "config_hash": content_id(config)}


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Items in their order; for ``size`` above 1 by length within some dozens, so that little of a batch is padding."""
    if size == 1:
        yield from ([item] for item in items)
        return
    source = iter(items)
    while some := list(itertools.islice(source, 16 * size)):
        some.sort(key=lambda item: (item.max_new_tokens, item.stop_ids, len(item.prompt_ids)))
        for _, alike in itertools.groupby(some, key=lambda item: (item.max_new_tokens, item.stop_ids)):
            alike = list(alike)
            yield from (alike[first : first + size] for first in range(0, len(alike), size))


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
    return names | {"prompt_tokens": len(item.prompt_ids), "was_cut": item.cut} | _made_from(item, variant)


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
    limit = getattr(model.config, "max_position_embeddings", None)
    longest, new_tokens = max(len(item.prompt_ids) for item in items), items[0].max_new_tokens
    if limit is not None and longest + new_tokens > limit:
        raise ValueError(
            f"{longest} prompt and {new_tokens} new tokens are more than the model's {limit} positions: lower the "
            "prompt limit."
        )
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    filler = ends[0] if ends else 0
    ids = [[filler] * (longest - len(item.prompt_ids)) + list(item.prompt_ids) for item in items]
    mask = [[0] * (longest - len(item.prompt_ids)) + [1] * len(item.prompt_ids) for item in items]
    ends += items[0].stop_ids
    clock = _FirstToken()
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        trace = None
        if variant.config is not None:
            trace = stack.enter_context(token_pruning(model, variant.config, variant.scorer))
        output = model.generate(
            torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=new_tokens,
            min_new_tokens=1,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=filler,
            streamer=clock,
        )
    seconds = time.perf_counter() - started
    times = {"batch": len(items), "prefill_seconds": clock.first_at - started, "generate_seconds": seconds}
    answers = []
    for row, item in enumerate(items):
        new_ids = _up_to_its_end(output[row, longest:].tolist(), ends)
        prediction = tokenizer.decode(new_ids, skip_special_tokens=True)
        answer = {"prediction": prediction, "score": item.score(prediction), "new_tokens": len(new_ids)} | times
        answers.append(answer if trace is None else answer | _kept(trace, row, len(item.prompt_ids)))
    return answers


def _up_to_its_end(new_ids: list[int], ends: Sequence[int]) -> list[int]:
    """What a row generated, its end token included; what stands after it only fills the batch."""
    for place, token in enumerate(new_ids):
        if token in ends:
            return new_ids[: place + 1]
    return new_ids


def _kept(trace: PruningTrace, row: int, tokens: int) -> dict[str, Any]:
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
    alive = np.ones(tokens, dtype=bool)
    for layer in sorted(trace.kept_positions):
        kept = np.zeros(tokens, dtype=bool)
        positions = trace.kept_positions[layer][row].cpu().numpy()
        kept[positions[positions >= 0]] = True
        fate[alive & ~kept] = layer
        alive = kept
    return base64.b64encode(zlib.compress(fate.tobytes(), 9)).decode()
