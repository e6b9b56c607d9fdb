"""Generated answers, full and pruned: one row an item and variant, for LongBench and the synthetic tasks alike.

An item is a tokenised prompt with its rules and a scoring function. A killed run goes on where
it stopped; an item that fails is a row of kind ``failure``. Greedy decoding through the engine: the pruned cache of the
prefill is the one that decode extends.
"""

from __future__ import annotations

import base64
import contextlib
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sdtp_lib import longbench, tasks
from sdtp_lib.config import PruningConfig
from sdtp_lib.data import tokenise_prompt
from sdtp_lib.engine import token_pruning
from sdtp_lib.fates import TokenFates
from sdtp_lib.records import RowWriter
from sdtp_lib.stage import Scorer
from sdtp_lib.trace import PruningTrace

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
    progress: Callable[[Item], None] | None = None,
) -> None:
    """One row for each item and variant that ``writer`` does not have yet.

    A row has ``dataset, item, variant, prompt_tokens, was_cut, prediction, score, new_tokens, prefill_seconds`` (to the
    first token), ``generate_seconds``, and for pruned variants ``tokens_per_layer, compression_ratio, dropped_at``
    (see `token_fates`).
    """
    for item in items:
        for variant in variants:
            key = f"{item.dataset}|{item.identifier}|{variant.name}"
            if writer.done(key):
                continue
            labels = {"dataset": item.dataset, "item": item.identifier, "variant": variant.name}
            labels |= {"prompt_tokens": len(item.prompt_ids), "was_cut": item.cut}
            try:
                measured = _answered(model, tokenizer, item, variant)
            except (RuntimeError, ValueError, MemoryError) as error:
                writer.add(key, kind="failure", **labels, error=f"{type(error).__name__}: {str(error)[:300]}")
            else:
                writer.add(key, kind="item", **labels, **measured)
        if progress is not None:
            progress(item)


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
def _answered(model: Any, tokenizer: Any, item: Item, variant: Variant) -> dict[str, Any]:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and len(item.prompt_ids) + item.max_new_tokens > limit:
        raise ValueError(
            f"{len(item.prompt_ids)} prompt and {item.max_new_tokens} new tokens are more than the model's {limit} "
            "positions: lower the prompt limit."
        )
    ids = torch.tensor([list(item.prompt_ids)], device=model.device)
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    clock = _FirstToken()
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        trace = None
        if variant.config is not None:
            trace = stack.enter_context(token_pruning(model, variant.config, variant.scorer))
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=item.max_new_tokens,
            min_new_tokens=1,
            do_sample=False,
            eos_token_id=[*ends, *item.stop_ids] or None,
            pad_token_id=ends[0] if ends else None,
            streamer=clock,
        )
    seconds = time.perf_counter() - started
    new_ids = output[0, ids.shape[1] :]
    prediction = tokenizer.decode(new_ids, skip_special_tokens=True)
    fields = {
        "prediction": prediction,
        "score": item.score(prediction),
        "new_tokens": len(new_ids),
        "prefill_seconds": clock.first_at - started,
        "generate_seconds": seconds,
    }
    if trace is not None:
        fields |= {
            "tokens_per_layer": trace.tokens_per_layer,
            "compression_ratio": trace.compression_ratio,
            "dropped_at": _packed(trace, len(item.prompt_ids), len(trace.tokens_per_layer)),
        }
    return fields


def token_fates(packed: str, layers: Sequence[int], num_layers: int) -> TokenFates:
    """What became of each prompt token, from the field ``dropped_at`` of a row; scores are not kept in rows."""
    fate = np.frombuffer(zlib.decompress(base64.b64decode(packed)), dtype=np.int16).astype(np.int64)
    return TokenFates(fate, tuple(layers), num_layers, np.full((len(layers), len(fate)), np.nan))


def _packed(trace: PruningTrace, tokens: int, num_layers: int) -> str:
    """Compressed: a prompt of 8,192 tokens as a list of numbers would be 30 kB in every row."""
    fate = np.full(tokens, num_layers, dtype=np.int16)
    alive = np.ones(tokens, dtype=bool)
    for layer in sorted(trace.kept_positions):
        kept = np.zeros(tokens, dtype=bool)
        positions = trace.kept_positions[layer][0].cpu().numpy()
        kept[positions[positions >= 0]] = True
        fate[alive & ~kept] = layer
        alive = kept
    return base64.b64encode(zlib.compress(fate.tobytes(), 9)).decode()
