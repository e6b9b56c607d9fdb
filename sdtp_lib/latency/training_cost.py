"""What a label and a training step cost, as ratios of plain forward passes.

Times the saliency pass and a training step, beside two passes that they contain: a plain forward, and a forward with a
backward to the inputs. Knows no file and no table.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sdtp_lib.latency import measure
from sdtp_lib.training.config import TrainingConfig
from sdtp_lib.training.labels import saliency_of
from sdtp_lib.training.saliency import compute_saliency
from sdtp_lib.training.trainer import train_pruners

LABELS = ("gradient_x_hidden", "removal")
FORWARD, BACKWARD = "forward", "forward and backward to the inputs"


def saliency_variants(
    model: Any, layers: Sequence[int], prompt_tokens: int, response_tokens: int = 32, seed: int = 0
) -> dict[str, Callable[[], None]]:
    """Callables for `measure.measure`: the plain passes, each label alone, and both labels in one pass (batch 1)."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (1, prompt_tokens + response_tokens), generator=generator).to(model.device)
    mask = torch.ones_like(ids)
    response = (torch.arange(ids.shape[1], device=ids.device) >= prompt_tokens).long()[None]

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False, logits_to_keep=response_tokens + 1)

    def backward() -> None:
        inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=inputs, use_cache=False, logits_to_keep=response_tokens + 1).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits.float(), ids[0, prompt_tokens:]).backward()

    def label(names: str | tuple[str, ...]) -> Callable[[], None]:
        return lambda: (saliency_of(model, ids, mask, response, layers, names), None)[1]

    return {
        FORWARD: forward,
        BACKWARD: backward,
        **{f"saliency, {name}": label(name) for name in LABELS},
        "saliency, both labels": label(LABELS),
    }


def training_seconds(model: Any, samples: Sequence[dict[str, Any]], layers: Sequence[int], **config: Any) -> float:
    """Seconds per sample of one epoch of `train_pruners` on samples that are labelled already.

    A run over all samples less one over half of them, so that what is done once (trainer, checkpoint) falls out.
    """
    with tempfile.TemporaryDirectory() as folder:
        labelled = compute_saliency(model, samples, layers, cache_dir=folder, progress=False)
        settings = TrainingConfig(epochs=1, batch_size=1, eval_share=0.0, **config)
        # Once before the clock: the first step of a process imports and allocates.
        spent = []
        for name, count in (("warm", 1), ("half", len(labelled) // 2), ("whole", len(labelled))):
            watch = measure.Stopwatch(model.device)
            train_pruners(
                model, labelled.select(range(count)), settings, layers=layers, output_dir=Path(folder) / name,
                resume=False, progress=False,
            )  # fmt: skip
            watch.mark("training")
            spent.append(watch.parts_ms()["training"] / 1e3)
    return (spent[2] - spent[1]) / (len(samples) - len(samples) // 2)


def measure_costs(
    model: Any, layers: Sequence[int], *, prompt_tokens: int = 512, samples: int = 8, repeats: int = 5, seed: int = 0
) -> list[dict[str, Any]]:
    """One row per measured thing: ``what, ms``, quartiles where repeated, and two ratios.

    ``forwards`` is over the plain forward's time, ``over_backward`` over a forward and backward to the inputs.
    """
    variants = saliency_variants(model, layers, prompt_tokens, seed=seed)
    measured = measure.measure(variants, repeats=repeats, warmup=1, device=model.device)
    times = {row["variant"]: row for row in measure.summarise(measured)}
    rows = [{"what": name, "ms": row["latency_ms"], "ms_low": row["latency_ms_low"], "ms_high": row["latency_ms_high"],
             "peak_memory_mb": row.get("peak_memory_mb")} for name, row in times.items()]  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    random_samples = [
        {"id": str(number), "prompt_ids": torch.randint(0, vocabulary, (prompt_tokens,), generator=generator).tolist(),
         "response_ids": torch.randint(0, vocabulary, (32,), generator=generator).tolist()}
        for number in range(samples)
    ]  # fmt: skip
    for name, config in (
        ("training step on labels alone", {}),
        ("training step with the LM loss", {"lm_weight": 1.0}),
        ("training step with distillation", {"distill_weight": 1.0}),
    ):
        rows.append({"what": name, "ms": 1e3 * training_seconds(model, random_samples, layers, seed=seed, **config)})
    forward, backward = times[FORWARD]["latency_ms"], times[BACKWARD]["latency_ms"]
    return [{**row, "forwards": row["ms"] / forward, "over_backward": row["ms"] / backward} for row in rows]
