"""What pruning costs besides what it saves: uneven batches, a keep ratio of 1, the scoring; and mixtures of experts.

    python benchmarks/overhead.py batches                 # 8 prompts of 500 to 4,000 tokens, together and one by one
    python benchmarks/overhead.py identity                # keep ratio 1.0 beside the plain model, in alternating pairs
    python benchmarks/overhead.py scoring                 # the share of a pruned prefill that the scorer takes
    python benchmarks/overhead.py experts                 # speed-up of mixtures of experts beside their limit by FLOPs

All print medians of paired repetitions on random prompts, with quartiles where there are enough. The models of
`experts` are random ones of 16 layers, 512 wide, 2 of 8 experts at work, scored by attention. Goals: a batch within
1.1 of the sum of its rows; keep ratio 1.0 and the scoring within 1 % of a prefill. A missed goal is printed as one.
On a CPU all times are this process's CPU time, so that who else runs counts little: give it one thread
(OMP_NUM_THREADS=1). glibc gives the large temporaries of a batch back to the system at every operation; with
MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 it keeps them, and a batch costs what its
rows cost.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sdtp_lib import PruningConfig, TokenPruners, budget, load_model, scorers, token_pruning
from sdtp_lib.architectures import num_layers
from sdtp_lib.commands.arguments import count
from sdtp_lib.config import PRESETS
from sdtp_lib.latency.measure import measure, quartiles
from sdtp_lib.latency.memory import peak_allocated_bytes
from sdtp_lib.model_shape import ModelShape
from sdtp_lib.shipped import shipped_for

BATCH_GOAL, SHARE_GOAL = 1.1, 0.01
# What differs between the families beside the common sizes of `run_experts`.
EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"head_dim": 64, "intermediate_size": 1024, "moe_intermediate_size": 384, "num_experts": 8},
    "mixtral": {"intermediate_size": 768, "num_local_experts": 8},
    "olmoe": {"intermediate_size": 384, "num_experts": 8},
    "gpt_oss": {"head_dim": 64, "intermediate_size": 512, "num_local_experts": 8},
}


def main(arguments: list[str] | None = None) -> int:
    whole = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--model", default="embedded", help="embedded, a local folder or a Hub id")
    common.add_argument("--preset", choices=list(PRESETS), default="keep08")
    common.add_argument("--seed", type=int, default=0)

    def command(name: str, call: Callable[..., None], lengths: list[int], repeats: int) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, parents=[common])
        sub.set_defaults(call=call)
        sub.add_argument("--lengths", type=count, nargs="+", default=lengths, help="prompt tokens")
        sub.add_argument("--repeats", type=count, default=repeats)
        return sub

    batches = command("batches", run_batches, list(range(500, 4001, 500)), 3)
    batches.add_argument("--memory", action="store_true", help="also count the bytes that torch has at its peak")
    batches.add_argument("--kinds", nargs="+", default=["pruned", "unpruned"], choices=["pruned", "unpruned", "plain"],
                         help="plain: the model outside token_pruning, with transformers' mask")  # fmt: skip
    command("identity", run_identity, [1024, 2048], 8)
    command("scoring", run_scoring, [1024, 2048, 4096], 5)
    experts = command("experts", run_experts, [2048], 5)
    experts.add_argument("--families", nargs="+", default=list(EXPERTS), choices=list(EXPERTS), help="model types")
    experts.add_argument("--layers", type=count, default=16)
    options = whole.parse_args(arguments)
    options.call(options, *(() if options.call is run_experts else _loaded(options)))
    return 0


@torch.no_grad()
def run_batches(options: argparse.Namespace, model: Any, scorer: Any, config: PruningConfig) -> None:
    width, vocabulary = max(options.lengths), model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(options.seed)
    batch, mask = (torch.zeros(len(options.lengths), width, dtype=torch.long) for _ in range(2))
    for row, length in enumerate(options.lengths):
        batch[row, width - length :] = torch.randint(vocabulary // 10, vocabulary, (length,), generator=generator)
        mask[row, width - length :] = 1
    batch, mask = batch.to(model.device), mask.to(model.device)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    configs = {"pruned": config, "unpruned": config.replace(keep_ratio=1.0)}

    def forward(kind: str, rows: slice, columns: slice) -> None:
        inputs = {"input_ids": batch[rows, columns], "attention_mask": mask[rows, columns],
                  "position_ids": positions[rows, columns], "logits_to_keep": 1, "use_cache": True}  # fmt: skip
        if kind == "plain":
            model(**inputs)
            return
        with token_pruning(model, configs[kind], scorer):
            model(**inputs)

    def together(kind: str) -> None:
        forward(kind, slice(None), slice(None))

    def one_by_one(kind: str) -> None:
        for row, length in enumerate(options.lengths):
            forward(kind, slice(row, row + 1), slice(width - length, None))

    kinds = options.kinds
    variants = {f"{how.__name__} {kind}": (lambda how=how, kind=kind: how(kind))
                for kind in kinds for how in (together, one_by_one)}  # fmt: skip
    forward(kinds[0], slice(0, 1), slice(width - 64, None))
    rows = _measured(variants, options.repeats, 0, model.device, _say)
    print(f"\n{len(options.lengths)} prompts of {min(options.lengths)} to {width} tokens, {options.preset}, medians of "
          f"{options.repeats}\n\n| | together s | one by one s | ratio | peak MB together | one by one |\n"
          "|---|---|---|---|---|---|")  # fmt: skip
    ratios = {}
    for kind in kinds:
        names = [f"{how} {kind}" for how in ("one_by_one", "together")]
        ratios[kind] = statistics.median(_paired(rows, names[1], names[0]))
        seconds = [statistics.median(row["seconds"] for row in rows if row["variant"] == name) for name in names]
        peaks = ["-", "-"]
        if options.memory:
            peaks = [f"{peak_allocated_bytes(variants[name], model.device) / 1e6:,.0f}" for name in names]
        print(f"| {kind} | {seconds[1]:.2f} | {seconds[0]:.2f} | {ratios[kind]:.3f} | {peaks[1]} | {peaks[0]} |")
    for kind in ("pruned", "unpruned"):
        if kind in ratios:
            _verdict(f"{kind}: a batch over the sum of its rows", ratios[kind], BATCH_GOAL)


@torch.no_grad()
def run_identity(options: argparse.Namespace, model: Any, scorer: Any, config: PruningConfig) -> None:
    config = config.replace(keep_ratio=1.0)
    for length in options.lengths:
        ids = _prompt(model, length, options.seed)

        def plain(ids=ids) -> None:
            _prefill(model, ids)

        def inside(scorer: Any, ids=ids) -> None:
            with token_pruning(model, config, scorer):
                _prefill(model, ids)

        variants = {"plain": plain, "free": lambda: inside(scorers.recency()), "shipped": lambda: inside(scorer)}
        rows = _measured(variants, options.repeats, 1, model.device)
        for name in ("free", "shipped"):
            low, middle, high = quartiles(ratio - 1 for ratio in _paired(rows, name, "plain"))
            print(f"{length} tokens, {name} scorer: {middle:+.2%} ({low:+.2%} to {high:+.2%})")
            _verdict(f"keep ratio 1.0 at {length} tokens, {name} scorer", middle, SHARE_GOAL)


@torch.no_grad()
def run_scoring(options: argparse.Namespace, model: Any, scorer: Any, config: PruningConfig) -> None:
    spent = 0.0

    def clock() -> float:
        if model.device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize(model.device)
        return time.perf_counter()

    def timed(stage: Any) -> torch.Tensor:
        nonlocal spent
        start = clock()
        scores = scorer(stage)
        spent += clock() - start
        return scores

    for length in options.lengths:
        ids, shares = _prompt(model, length, options.seed), []
        for repetition in range(-1, options.repeats):
            with token_pruning(model, config, timed):
                spent, start = 0.0, clock()
                _prefill(model, ids)
                whole = clock() - start
            if repetition >= 0:
                shares.append(spent / whole)
        low, middle, high = quartiles(shares)
        print(f"{length} tokens, {options.preset}: scoring {middle:.2%} ({low:.2%} to {high:.2%}) of the prefill")
        _verdict(f"scoring at {length} tokens", middle, SHARE_GOAL)


@torch.no_grad()
def run_experts(options: argparse.Namespace) -> None:
    """Eager attention (gpt_oss has no other) shrinks faster than FLOPs: its T x T matrices are moved, not computed."""
    sizes = {"vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": options.layers, "num_attention_heads": 8,
             "num_key_value_heads": 4, "num_experts_per_tok": 2, "max_position_embeddings": 8192}  # fmt: skip
    config, scorer = PruningConfig.preset(options.preset, options.layers), scorers.attention(16)
    columns = ("family", "tokens", "attention", "unpruned ms", "speed-up (quartiles)", "limit by FLOPs")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for family in options.families:
        own = sizes | EXPERTS[family]
        if family == "gpt_oss":
            own["layer_types"] = ["full_attention"] * options.layers
        torch.manual_seed(options.seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **own)).eval()
        shape = ModelShape.from_model(model)
        for length in options.lengths:
            ids = _prompt(model, length, options.seed)

            def plain(model=model, ids=ids) -> None:
                _prefill(model, ids)

            def pruned(model=model, ids=ids) -> None:
                with token_pruning(model, config, scorer):
                    _prefill(model, ids)

            rows = _measured({"plain": plain, "pruned": pruned}, options.repeats, 1, model.device)
            low, middle, high = quartiles(1 / share for share in _paired(rows, "pruned", "plain"))
            before = 1e3 * statistics.median(row["seconds"] for row in rows if row["variant"] == "plain")
            limit = budget.speedup_limit(shape, config, length)
            print(f"| {family} | {length:,} | {model.config._attn_implementation} | {before:,.0f} | "
                  f"{middle:.2f}x ({low:.2f} to {high:.2f}) | {limit:.2f}x |", flush=True)  # fmt: skip


def _loaded(options: argparse.Namespace) -> tuple[Any, Any, PruningConfig]:
    model, _ = load_model(options.model)
    config = PruningConfig.preset(options.preset, num_layers(model))
    shipped = shipped_for(options.model)
    scorer = TokenPruners.from_pretrained(str(shipped)).eval() if shipped else scorers.attention(8)
    return model, scorer, config


def _prefill(model: Any, ids: torch.Tensor) -> None:
    model(input_ids=ids, use_cache=True, logits_to_keep=1)


def _prompt(model: Any, length: int, seed: int) -> torch.Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary // 10, vocabulary, (1, length), generator=generator).to(model.device)


def _paired(rows: list[dict[str, Any]], variant: str, baseline: str) -> list[float]:
    """Time of ``variant`` over that of ``baseline``, repetition by repetition."""
    times = {(row["variant"], row["repetition"]): row["seconds"] for row in rows}
    return [spent / times[baseline, repetition] for (name, repetition), spent in times.items() if name == variant]


def _measured(
    variants: dict[str, Callable[[], None]], repeats: int, warmup: int, device: torch.device, on_row: Any = None
) -> list[dict[str, Any]]:
    """Rows of `measure` with ``seconds``: on a CPU its time per thread, else the clock's."""
    rows = measure(variants, repeats=repeats, warmup=warmup, device=device, on_row=on_row)
    for row in rows:
        row["seconds"] = row["latency_ms"] / 1e3 * (1 if device.type == "cuda" else row["cpu_share"])
    return rows


def _say(row: dict[str, Any]) -> None:
    seconds, grown = row["latency_ms"] / 1e3, row["memory_growth_mb"] or 0
    print(f"{row['variant']}: {seconds:.2f} s, resident memory + {grown:,.0f} MB", flush=True)


def _verdict(what: str, found: float, goal: float) -> None:
    shown: Sequence[str] = [f"{value:.2%}" if goal < 1 else f"{value:.3f}" for value in (found, goal)]
    print(f"{'met' if found <= goal else 'MISSED'}: {what} is {shown[0]}, goal at most {shown[1]}")


if __name__ == "__main__":
    from sdtp_lib.checked import told

    sys.exit(told(main))
