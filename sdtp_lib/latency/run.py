"""Measure variants side by side on one model and keep every repetition as a row.

Ties `methods.variant` (what is computed), `measure` (how it is measured) and `records` (where it goes) together. A
run that was stopped goes on at the repetition where it stopped. Knows no table and no picture: those are views of the
rows (`report`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from sdtp_lib import budget, data
from sdtp_lib.architectures.caches import cache_lengths
from sdtp_lib.data import tasks
from sdtp_lib.evaluation.compare import add_rows, on_sample, sample_hash
from sdtp_lib.evaluation.divergence import kl_divergence
from sdtp_lib.latency import measure
from sdtp_lib.latency.generation import plain_prefill, prefill_and_decode
from sdtp_lib.latency.measure import Stopwatch
from sdtp_lib.latency.memory import peak_allocated_bytes
from sdtp_lib.methods.method import pass_flops
from sdtp_lib.methods.variant import UNPRUNED, Variant
from sdtp_lib.records import RowWriter, content_id

Progress = Callable[[str], None]


def progress_on(bar: Any) -> Progress:
    """Progress lines as the description of a tqdm bar."""

    def show(text: str) -> None:
        bar.set_description(text)
        bar.update()

    return show


def quality_samples(
    tokenizer: Any, *, prompt_tokens: int, count: int, continuation_tokens: int = 64, seed: int = 0
) -> dict[str, list[dict[str, Any]]]:
    """Held-out texts for `run_quality`: running English, and prompts that ask about one sentence far back."""
    needles = tasks.synthetic_tasks(
        "needle", tokenizer=tokenizer, prompt_tokens=prompt_tokens, count=count, seed=seed, split="test"
    )
    windows = data.text_windows(
        data.long_documents("heldout"), tokenizer, prompt_tokens=prompt_tokens,
        continuation_tokens=continuation_tokens, limit=count, seed=seed,
    )  # fmt: skip
    return {"text": windows, "needle": [tasks.as_sample(record, tokenizer) for record in needles]}


def run(
    model: Any,
    writer: RowWriter,
    methods_at: Callable[[int], list[Variant]],
    prompt_lengths: Iterable[int],
    *,
    new_tokens: int = 128,
    repeats: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Time every method at every length in turn; one row of kind ``latency`` per method, length and repetition.

    Parameters
    ----------
    methods_at
        Prompt length -> methods; the unpruned one must be among them.
    new_tokens
        Generated in all, the prefill's token included; 1 measures the prefill alone.
    seed
        Of the prompts, which are random token ids: latency does not depend on what they say.

    Returns
    -------
    list of rows
        Those measured now (`read_rows` gives all).

    Raises
    ------
    OtherProvenance
        If ``writer`` has rows of these methods that another scorer or pruning config made.
    """
    written: list[dict[str, Any]] = []
    for tokens in prompt_lengths:
        written += _run_length(model, writer, methods_at(tokens), tokens, new_tokens, repeats, seed, progress)
    return written


def _run_length(
    model: Any,
    writer: RowWriter,
    found: list[Variant],
    tokens: int,
    new_tokens: int,
    repeats: int,
    seed: int,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    shape = budget.ModelShape.from_model(model)
    # What a decode step reads: not the experts that a token does not meet.
    weights = round(shape.read_share * sum(parameter.nbytes for parameter in model.parameters()))
    ids = prompt_ids(shape.vocab_size, tokens, seed).to(model.device)
    by_name = {method.name: method for method in found}
    hashes = {method.name: config_hash(method, model, tokens) for method in found}
    scorer_ids = writer.scored_by({method.name: method.scorer for method in found})
    written: list[dict[str, Any]] = []

    def key(name: str, repetition: int) -> str:
        return f"{tokens}+{new_tokens}/{name}/{repetition}"

    def done(name: str, repetition: int) -> bool:
        # Memory that ran out in this run would run out again; another run may have more.
        exhausted = any(writer.failed(key(name, other)) for other in range(repeats))
        return writer.done(key(name, repetition), config_hash=hashes[name]) or exhausted

    def keep(row: dict[str, Any]) -> None:
        name = row.pop("variant")
        # The generation's own clock, which starts before the session opens, is the latency.
        row.pop("latency_ms")
        counted = {"prompt_tokens": tokens, "weight_bytes": weights, **describe(by_name[name], model, tokens)}
        row = {"new_tokens": new_tokens, "scorer_id": scorer_ids[name], **row}
        written.append(writer.add(key(name, row["repetition"]), kind="latency", **counted, **row))

    missing = [name for name in by_name if not all(done(name, repetition) for repetition in range(repeats))]
    # A GPU loads kernels by shape, so every method warms up; on a CPU memory is what must be touched once, and the
    # unpruned method, which is the first, touches the most.
    for name in missing if ids.is_cuda else missing[:1]:
        if progress:
            progress(f"{tokens} tokens, {name}: warm-up")
        measure.measure_once(lambda name=name: row_fields(by_name[name], model, ids, min(new_tokens, 2)), ids.device)
    measure.measure(
        {name: lambda name=name: row_fields(by_name[name], model, ids, new_tokens) for name in missing},
        repeats=repeats, warmup=0, device=ids.device, on_row=keep, done=done,
        progress=None if progress is None else lambda text: progress(f"{tokens} tokens, {text}"),
    )  # fmt: skip
    return written


def row_fields(variant: Variant, model: Any, input_ids: torch.Tensor, new_tokens: int) -> dict[str, Any]:
    """One timed greedy generation as the fields of a row; lengths and bytes are read from the cache, never assumed.

    Entering the ``with`` is on the clock, since a user pays for it too.
    """
    watch = Stopwatch(input_ids.device)
    with variant.applied(model):
        generation = prefill_and_decode(model, input_ids, new_tokens, watch)
    return {
        **generation.fields(),
        **{f"part_{name}_ms": value for name, value in generation.parts_ms.items()},
        # What the prefill left; decode adds the same number of keys to every layer of every method.
        "kv_tokens_per_layer": [length - (new_tokens - 1) for length in cache_lengths(generation.cache)],
        "kv_bytes": generation.prompt_kv_bytes(),
    }


def config_hash(variant: Variant, model: Any, prompt_tokens: int) -> str:
    """What the field of this name says in a variant's rows."""
    config = variant.config(model, prompt_tokens)
    return content_id(config and config.to_dict())


def describe(variant: Variant, model: Any, prompt_tokens: int) -> dict[str, Any]:
    """What a variant computes at a length, counted: the fields of its rows that no clock is needed for."""
    shape, config = budget.ModelShape.from_model(model), variant.config(model, prompt_tokens)
    passes = variant.passes(model, prompt_tokens)
    ratio = config.keep_ratio if config is not None else None
    return {
        "method": variant.name,
        "family": variant.kind,
        "config_hash": config_hash(variant, model, prompt_tokens),
        "keep_ratio": ratio if not isinstance(ratio, tuple) else None,
        "prune_layers": list(config.layers) if config is not None else None,
        "tflops": sum(pass_flops(shape, counts) for counts in passes) / 1e12,
        "tokens_computed_per_layer": [sum(counts) for counts in zip(*passes, strict=True)],
        "compression_ratio": prompt_tokens * shape.num_layers / sum(sum(counts) for counts in passes),
    }


def run_quality(
    model: Any,
    writer: RowWriter,
    methods_at: Callable[[int], list[Variant]],
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Quality and prefill time of every method on the same texts; one row of kind ``quality`` per method and sample.

    Parameters
    ----------
    samples
        Name of the kind of text -> samples (see `data`). The response is scored from the cache that the method's
        prefill left, and compared with the unpruned model: KL in nats per token.
    """
    written = []
    for text, group in samples.items():
        for number, sample in enumerate(group):
            tokens = len(sample["prompt_ids"])
            found = methods_at(tokens)
            # Turned like the repetitions of a latency run, so that each method stands at each place.
            found = found[number % len(found) :] + found[: number % len(found)]
            ids = writer.scored_by({variant.name: variant.scorer for variant in found})
            labels = {"text": text, "sample": sample["id"], "sample_hash": sample_hash(sample), "prompt_tokens": tokens}
            measure_on, todo = _timed_on(model, sample), []
            for variant in found:
                key, own = f"quality/{text}/{sample['id']}/{variant.name}", describe(variant, model, tokens)
                if not writer.done(key, sample_hash=labels["sample_hash"], config_hash=own["config_hash"]):
                    own |= labels | {"scorer_id": ids[variant.name]}
                    todo.append((key, own, functools.partial(measure_on, variant)))
            if todo and progress:
                progress(f"quality on {text} {number + 1} of {len(group)}")
            written += add_rows(writer, todo, kind="quality")
    return written


def _timed_on(model: Any, sample: Mapping[str, Any]) -> Callable[[Variant], dict[str, Any]]:
    unpruned = functools.cache(lambda: on_sample(model, sample, Variant(UNPRUNED))[1])

    def measure_on(variant: Variant) -> dict[str, Any]:
        full = unpruned()
        return on_sample(model, sample, variant, full, Stopwatch(model.device))[0]

    return measure_on


def peak_allocated(model: Any, variant: Variant, prompt_tokens: int, seed: int = 0) -> int:
    """Most bytes of tensors held at once during one prefill, the weights not counted (a separate, untimed pass)."""
    ids = prompt_ids(budget.ModelShape.from_model(model).vocab_size, prompt_tokens, seed)
    return peak_of_prefill(model, variant, ids.to(model.device))


def peak_of_prefill(model: Any, variant: Variant, input_ids: torch.Tensor) -> int:
    """The same for these token ids (1, T)."""

    def prefill() -> Any:
        with torch.inference_mode(), variant.applied(model):
            return plain_prefill(model, input_ids)

    return peak_allocated_bytes(prefill, input_ids.device)


def dtype_comparison(
    model: Any, prompt_tokens: int, dtypes: Sequence[torch.dtype], *, repeats: int = 3, seed: int = 0
) -> list[dict[str, Any]]:
    """Prefill time in each type, in turn, and the last position's KL to the first type; the model's own is put back."""
    ids = prompt_ids(budget.ModelShape.from_model(model).vocab_size, prompt_tokens, seed).to(model.device)
    before, logits = model.dtype, {}
    rows: list[dict[str, Any]] = []
    try:
        for repetition in range(-1, repeats):
            for dtype in dtypes:
                model.to(dtype)
                with torch.inference_mode():
                    row = measure.measure_once(
                        lambda dtype=dtype: logits.update({dtype: plain_prefill(model, ids)[0][0].float()}), ids.device
                    )
                if repetition >= 0:
                    name = str(dtype).removeprefix("torch.")
                    kl = kl_divergence(logits[dtypes[0]], logits[dtype])
                    rows.append({"variant": name, "repetition": repetition, "kl_nats": kl, **row})
    finally:
        model.to(before)
    return rows


def prompt_ids(vocab_size: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Random token ids (1, T), the same for the same seed and length."""
    return torch.randint(0, vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed * 1_000_003 + tokens))
