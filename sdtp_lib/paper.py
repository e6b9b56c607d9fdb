"""The figures that arXiv 2504.04514v2 prints, and ours beside them.

No model in memory, nothing measured. Units are in the names. All from Mistral-7B-Instruct-v0.2 unless said.
``python -m sdtp_lib.paper`` prints how far each reading of the paper's layer list is from its Table 2, and what the
cost model predicts for that table.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

from sdtp_lib import budget
from sdtp_lib.config import PruningConfig
from sdtp_lib.latency import cost_model
from sdtp_lib.model_shape import ModelShape

PAPER_KEEP_RATIO = 0.9
PAPER_NEW_TOKENS = 128

# The paper says "first at the 4th layer, then every 3rd": neither 0- or 1-based nor before or after is said.
TABLE2_LAYER_LISTS = {
    "before 4, 7 .. 31": tuple(range(4, 32, 3)),
    "before 3, 6 .. 30": tuple(range(3, 31, 3)),
    "before 2, 5 .. 29": tuple(range(2, 30, 3)),
}

# Table 2, batch 1, 128 new tokens, unpruned and SDTP (S = 10, r = 0.9).
TABLE2_COLUMNS = (
    "prompt_tokens", "prefill_tflops", "prefill_tflops_sdtp", "prefill_s", "prefill_s_sdtp",
    "end_to_end_s", "end_to_end_s_sdtp", "memory_gb", "memory_gb_sdtp",
)  # fmt: skip
TABLE2 = tuple(
    dict(zip(TABLE2_COLUMNS, values, strict=True))
    for values in (
        (4096, 72.51, 47.81, 0.31, 0.20, 3.70, 3.43, 15.55, 15.04),
        (8192, 158.22, 102.01, 0.64, 0.40, 4.85, 3.98, 17.10, 15.86),
        (16384, 369.22, 229.41, 1.40, 0.84, 7.17, 5.46, 20.20, 17.55),
        (32768, 949.54, 560.40, 3.40, 1.90, 13.63, 8.95, 26.41, 20.95),
        (65536, 2743.46, 1526.98, 9.33, 4.99, 27.75, 16.92, 39.31, 28.24),
        (131072, 8864.49, 4678.81, 29.30, 13.60, 63.69, 36.35, 65.13, 42.82),
    )
)

# Table 1, LongBench English; the average is over the 14 data sets, not over the five columns.
TABLE1_COLUMNS = ("single_doc", "multi_doc", "summarisation", "few_shot", "code", "average")
TABLE1 = {
    method: dict(zip(TABLE1_COLUMNS, values, strict=True))
    for method, values in {
        "original": (36.66, 29.88, 28.26, 66.95, 53.74, 42.34),
        "LLMLingua-2-small": (31.55, 29.04, 26.79, 49.24, 32.61, 33.94),
        "LLMLingua-2": (31.35, 30.57, 27.29, 52.29, 33.87, 35.16),
        "sdtp": (32.70, 27.74, 26.65, 62.74, 53.99, 39.82),
        "sdtp-low": (35.60, 28.83, 27.26, 64.58, 52.43, 40.98),
    }.items()
}


def paper_prefill_flops(shape: ModelShape, tokens_per_layer: Sequence[int]) -> float:
    """Prefill FLOPs by the formula behind Table 2: ``sum_l 2 n_l (4 D^2 + 3 D F) + 3 n_l^2 D``, plus ``2 T * 2 V D``.

    Against `budget.prefill_flops`: no grouped heads, 1.5 times causal attention, embedding and head as matrix products
    over all T tokens. It is the formula of a dense model with a gated feed-forward part, F its inner size.
    """
    linear, squares = sum(tokens_per_layer), sum(n * n for n in tokens_per_layer)
    matrices = 4 * shape.hidden_size**2 + 3 * shape.hidden_size * shape.intermediate_size
    tables = 2 * shape.vocab_size * shape.hidden_size
    return 2 * linear * matrices + 3 * squares * shape.hidden_size + 2 * tokens_per_layer[0] * tables


def paper_table2() -> list[dict[str, Any]]:
    """How far `paper_prefill_flops` is from Table 2, for each prompt length and reading of the layer list.

    Three readings of "keep 0.9": of the current tokens (this library); of the current unprotected ones; of the
    unprotected ones when the protected end is the last tenth of the *prompt* and does not shrink.
    """
    shape = ModelShape.named("Mistral-7B-Instruct-v0.2")
    rows = []
    for printed in TABLE2:
        tokens = printed["prompt_tokens"]
        full = paper_prefill_flops(shape, [tokens] * shape.num_layers) / 1e12
        for list_name, layers in TABLE2_LAYER_LISTS.items():
            for reading in ("current", "unprotected", "unprotected, end fixed"):
                counts = _paper_counts(tokens, layers, reading, shape.num_layers)
                pruned = paper_prefill_flops(shape, counts) / 1e12
                rows.append(
                    {
                        "prompt_tokens": tokens,
                        "layers": list_name,
                        "ratio_of": reading,
                        "full_tflops": full,
                        "full_error_percent": 100 * (full / printed["prefill_tflops"] - 1),
                        "pruned_tflops": pruned,
                        "pruned_error_percent": 100 * (pruned / printed["prefill_tflops_sdtp"] - 1),
                        "compression_ratio": budget.compression_ratio(counts),
                    }
                )
    return rows


def _paper_counts(tokens: int, layers: tuple[int, ...], reading: str, num_layers: int) -> list[int]:
    ratio, left, counts = PAPER_KEEP_RATIO, tokens, []
    for layer in range(num_layers):
        if layer in layers:
            protected = 4 + math.ceil(0.1 * (tokens if reading == "unprotected, end fixed" else left))
            free = left if reading == "current" else left - protected
            left += math.floor(ratio * free + 1e-9) - free
        counts.append(left)
    return counts


def against_paper(
    hardware: cost_model.Hardware, layers: Sequence[int] = tuple(range(4, 32, 3))
) -> list[dict[str, Any]]:
    """Table 2 of the paper (Mistral-7B, keep 0.9, 128 new tokens, bfloat16) beside the prediction, row by row."""
    shape = ModelShape.named("Mistral-7B-Instruct-v0.2")
    config = PruningConfig(layers=tuple(layers), keep_ratio=PAPER_KEEP_RATIO)
    rows = []
    for printed in TABLE2:
        found = cost_model.predict(shape, hardware, config, printed["prompt_tokens"], new_tokens=PAPER_NEW_TOKENS)
        rows.append(
            {
                "prompt_tokens": printed["prompt_tokens"],
                "hardware": hardware.name,
                "prefill_s": found["prefill_ms"] / 1e3,
                "prefill_s_paper": printed["prefill_s"],
                "prefill_s_sdtp": found["prefill_ms_pruned"] / 1e3,
                "prefill_s_sdtp_paper": printed["prefill_s_sdtp"],
                "prefill_speedup": found["prefill_speedup"],
                "prefill_speedup_paper": printed["prefill_s"] / printed["prefill_s_sdtp"],
                "end_to_end_s": found["end_to_end_ms"] / 1e3,
                "end_to_end_s_paper": printed["end_to_end_s"],
                "end_to_end_speedup": found["end_to_end_speedup"],
                "end_to_end_speedup_paper": printed["end_to_end_s"] / printed["end_to_end_s_sdtp"],
                "memory_gb": found["memory_gb"],
                # What the unpruned model takes if it computes logits for the whole prompt.
                "memory_gb_all_logits": cost_model.memory_gb(
                    shape, [printed["prompt_tokens"]] * shape.num_layers, logits_positions=printed["prompt_tokens"]
                ),
                "memory_gb_paper": printed["memory_gb"],
                "memory_gb_sdtp": found["memory_gb_pruned"],
                "memory_gb_sdtp_paper": printed["memory_gb_sdtp"],
            }
        )
    return rows


def _print_paper_table2() -> None:
    print(" prompt layers             ratio of                     full    error    pruned    error  1/tau")
    for row in paper_table2():
        print(
            "{prompt_tokens:7d} {layers:18} {ratio_of:23} {full_tflops:9.2f} {full_error_percent:+7.3f}% "
            "{pruned_tflops:9.2f} {pruned_error_percent:+7.2f}% {compression_ratio:6.3f}".format(**row)
        )


def _print_against_paper() -> None:
    for hardware in cost_model.HARDWARE.values():
        print(f"{hardware.name}: predicted (paper's Table 2), Mistral-7B, keep 0.9 before layers 4, 7 .. 31")
        for row in against_paper(hardware):
            print(
                "{prompt_tokens:7d}  prefill {prefill_s:6.2f} ({prefill_s_paper:5.2f}) s -> {prefill_s_sdtp:6.2f} "
                "({prefill_s_sdtp_paper:5.2f}) s, {prefill_speedup:.2f}x ({prefill_speedup_paper:.2f}x); end to end "
                "{end_to_end_s:6.2f} ({end_to_end_s_paper:5.2f}) s, {end_to_end_speedup:.2f}x "
                "({end_to_end_speedup_paper:.2f}x); memory {memory_gb:5.2f}, all logits {memory_gb_all_logits:5.2f} "
                "({memory_gb_paper:5.2f}) -> {memory_gb_sdtp:5.2f} ({memory_gb_sdtp_paper:5.2f}) GB".format(**row)
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the paper's Table 2 beside our counts and predictions."""
    parser = argparse.ArgumentParser(
        prog="python -m sdtp_lib.paper",
        description="Hold the paper's Table 2 (arXiv 2504.04514, Mistral-7B, keep 0.9) against our counts and "
        "predictions. Nothing is measured.",
    )
    what = "flops: counts by the paper's own formula; times: the cost model's predictions (default: all)"
    parser.add_argument("what", nargs="?", choices=("flops", "times", "all"), default="all", help=what)
    chosen = parser.parse_args(arguments).what
    if chosen != "times":
        _print_paper_table2()
    if chosen != "flops":
        _print_against_paper()


if __name__ == "__main__":
    main()
