"""A cost model: milliseconds and gigabytes of prefill and decode from FLOPs, bytes, bandwidth and launches.

Everything here is a *prediction*: arithmetic on a `ModelShape`, tokens per layer and a `Hardware`. No torch, nothing
measured. The hardware's figures are achieved rates, not data-sheet peaks: those of this machine come from
`hardware.measure_hardware`, those of named GPUs are a peak times a stated efficiency.

A prefill takes the longer of what its kernels compute and what the host needs to launch them (where nothing is queued:
the sum); a decode step likewise, its kernels being the bytes of weights and cache that it moves.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sdtp_lib import budget
from sdtp_lib.config import PruningConfig
from sdtp_lib.layer_shape import LayerShape
from sdtp_lib.model_shape import ModelShape, element_bytes


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Achieved rates of one machine for one number type.

    Attributes
    ----------
    name
        For titles.
    matmul_tflops
        Of the model's matrix products over many tokens, 10^12 FLOPs per second.
    attention_tflops
        Of causal attention, counting the half that is needed (2 n^2 D per layer).
    bandwidth_gb_s
        Of reading weights and cache in decode, 10^9 bytes per second.
    elementwise_gb_s
        Of norms, rotary positions, activations and residuals in prefill; often cached, so it may exceed the former.
    launch_us
        Microseconds the host spends on one operation, Python included.
    asynchronous
        True where the host queues work ahead (CUDA): launches then hide behind compute.
    cache_passes
        How often a decode step moves the whole cache at ``bandwidth_gb_s``. A DynamicCache concatenates: it reads and
        writes all of it before attention reads it again; a CPU's caches hide part of that.
    """

    name: str
    matmul_tflops: float
    attention_tflops: float
    bandwidth_gb_s: float
    elementwise_gb_s: float
    launch_us: float
    asynchronous: bool = True
    cache_passes: float = 3.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "float" and not value > 0:
                raise ValueError(f"{field.name}={value!r} is not a positive rate.")


# Peak (dense bfloat16, data sheet) times what large matmuls and FlashAttention-2 forward passes are known to reach.
HARDWARE = {
    "A100-80GB": Hardware("A100-80GB", 312 * 0.72, 312 * 0.68, 2039 * 0.80, 2039 * 0.80, 12.0),
    "H100-SXM": Hardware("H100-SXM", 989 * 0.62, 989 * 0.40, 3350 * 0.80, 3350 * 0.80, 10.0),
}

# Operations a transformers decoder layer launches, counted with torch's profiler on Llama's (sdpa, one token).
LAUNCHES_PER_LAYER = 60
# Counted alike at a stage of the shipped pruners: inputs, network, blend, sort, gathers of hidden states and tables.
LAUNCHES_PER_STAGE = 370


def elementwise_bytes(layer: LayerShape, hidden_size: int, tokens: int, bytes_per_element: int) -> int:
    """Bytes that one layer's operations other than matmuls and attention move for ``tokens`` tokens.

    Counted on Llama's eager code: two norms and two residuals move about 22 D, rotary positions about 11 times the
    width of queries and keys, the gated activation about 5 F (F the inner size), the cache twice the keys and values.
    """
    rotary = 11 * (layer.query_width + layer.num_kv_heads * layer.key_size)
    widths = 22 * hidden_size + rotary + 2 * layer.cache_width + 5 * layer.inner_width
    return tokens * bytes_per_element * widths


def prefill_ms(
    shape: ModelShape,
    hardware: Hardware,
    tokens_per_layer: Sequence[int],
    *,
    dtype: str = "bfloat16",
    pruned_layers: Sequence[int] = (),
) -> float:
    """Predicted milliseconds of one prefill (batch 1, logits of the last position), with its stages' own cost."""
    size, kernels = element_bytes(dtype), 0.0
    launches = LAUNCHES_PER_LAYER * len(tokens_per_layer) + LAUNCHES_PER_STAGE * len(pruned_layers) + 10
    for tokens, layer in zip(tokens_per_layer, shape.layers, strict=True):
        pairs = budget.causal_pairs(tokens, tokens_per_layer[0], layer.window)
        kernels += 1e-9 * 2 * tokens * layer.matmul_weights / hardware.matmul_tflops
        kernels += 1e-9 * pairs * layer.flops_per_pair / hardware.attention_tflops
        kernels += 1e-6 * elementwise_bytes(layer, shape.hidden_size, tokens, size) / hardware.elementwise_gb_s
    for layer in pruned_layers:
        before, after = tokens_per_layer[layer - 1], tokens_per_layer[layer]
        kernels += 1e-9 * budget.pruner_flops(shape.hidden_size, [layer], tokens_per_layer) / hardware.matmul_tflops
        kernels += 1e-6 * size * shape.hidden_size * (before + 2 * after) / hardware.elementwise_gb_s
    kernels += 1e-9 * 2 * tokens_per_layer[0] * shape.outer_weights / hardware.matmul_tflops
    head = size * shape.head_weights
    return _with_launches(kernels + 1e-6 * head / hardware.bandwidth_gb_s, launches, hardware)


def decode_ms(
    shape: ModelShape,
    hardware: Hardware,
    kv_lengths_per_layer: Sequence[int],
    new_tokens: int,
    *,
    dtype: str = "bfloat16",
) -> float:
    """Predicted milliseconds of ``new_tokens`` one-token forwards on a cache of these lengths."""
    size = element_bytes(dtype)
    grown = [length + (new_tokens + 1) / 2 for length in kv_lengths_per_layer]
    cache = hardware.cache_passes * budget.kv_bytes(shape, grown, size)
    weights = size * shape.active_weights
    step = _with_launches(1e-6 * (weights + cache) / hardware.bandwidth_gb_s, _step_launches(shape), hardware)
    return new_tokens * step


def memory_gb(
    shape: ModelShape, tokens_per_layer: Sequence[int], *, dtype: str = "bfloat16", logits_positions: int = 1
) -> float:
    """Predicted peak of a prefill in 10^9 bytes: weights, KV cache, the widest layer's activations, float32 logits.

    Transformers keeps the residual, the normed input and three tensors of the inner size at the widest point.
    """
    size = element_bytes(dtype)
    inner = max(layer.inner_width for layer in shape.layers)
    widest = max(tokens_per_layer) * size * (3 * shape.hidden_size + 3 * inner)
    logits = 4 * logits_positions * shape.vocab_size
    return (shape.weight_bytes(dtype) + budget.kv_bytes(shape, tokens_per_layer, size) + widest + logits) / 1e9


def predict(
    shape: ModelShape,
    hardware: Hardware,
    config: PruningConfig,
    prompt_tokens: int,
    *,
    new_tokens: int = 128,
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    """What pruning would change, predicted.

    Returns
    -------
    dict
        ``prefill_ms, prefill_ms_pruned, decode_ms, decode_ms_pruned, end_to_end_ms, end_to_end_ms_pruned``, their
        ratios ``prefill_speedup, decode_speedup, end_to_end_speedup``, ``prefill_limit`` (FLOPs alone), ``kv_gb,
        kv_gb_pruned, memory_gb, memory_gb_pruned``, ``compression_ratio`` and ``is_prediction`` (True).
    """
    full = [prompt_tokens] * shape.num_layers
    pruned = budget.tokens_per_layer(config, shape.num_layers, prompt_tokens)
    values: dict[str, Any] = {"hardware": hardware.name, "prompt_tokens": prompt_tokens, "is_prediction": True}
    for suffix, counts, stages in (("", full, ()), ("_pruned", pruned, config.layers)):
        prefill = prefill_ms(shape, hardware, counts, dtype=dtype, pruned_layers=stages)
        # The prefill gives the first of the new tokens.
        decode = decode_ms(shape, hardware, counts, new_tokens - 1, dtype=dtype)
        values |= {f"prefill_ms{suffix}": prefill, f"decode_ms{suffix}": decode}
        values[f"end_to_end_ms{suffix}"] = prefill + decode
        values[f"kv_gb{suffix}"] = budget.kv_bytes(shape, counts, element_bytes(dtype)) / 1e9
        values[f"memory_gb{suffix}"] = memory_gb(shape, counts, dtype=dtype)
    for name in ("prefill", "decode", "end_to_end"):
        after = values[f"{name}_ms_pruned"]
        values[f"{name}_speedup"] = values[f"{name}_ms"] / after if after else 1.0
    values["prefill_limit"] = budget.speedup_limit(shape, config, prompt_tokens)
    values["compression_ratio"] = budget.compression_ratio(pruned)
    return values


def over_lengths(
    shape: ModelShape,
    hardware: Hardware,
    config: PruningConfig,
    lengths: Sequence[int] = tuple(2**power for power in range(10, 18)),
    *,
    dtype: str = "bfloat16",
) -> list[dict[str, Any]]:
    """`predict` at each length, labelled with the keep ratio as ``method``: what a curve is drawn from."""
    label = f"keep {config.keep_ratio}"
    return [{"method": label, **predict(shape, hardware, config, tokens, dtype=dtype)} for tokens in lengths]


def sentence(predicted: Mapping[str, Any]) -> str:
    """One prediction in words."""
    return (
        "predicted at {prompt_tokens:,} tokens on {hardware}: prefill {prefill_ms:,.0f} -> {prefill_ms_pruned:,.0f} ms "
        "({prefill_speedup:.2f}x, limit {prefill_limit:.2f}x), end to end {end_to_end_speedup:.2f}x, "
        "KV {kv_gb:.2f} -> {kv_gb_pruned:.2f} GB"
    ).format(**predicted)


def against_measured(
    shape: ModelShape,
    hardware: Hardware,
    table: Sequence[Mapping[str, Any]],
    configs: Mapping[str, PruningConfig | None],
    *,
    dtype: str,
) -> list[dict[str, Any]]:
    """Predicted beside measured milliseconds.

    ``table`` is `report.summary`'s; of it those rows count whose method is in ``configs``.
    """
    rows = []
    for row in table:
        if row["method"] not in configs or row.get("prefill_ms") is None:
            continue
        config, tokens = configs[row["method"]], row["prompt_tokens"]
        counts = budget.tokens_per_layer(config, shape.num_layers, tokens)
        stages = config.layers if config is not None else ()
        predicted = {
            "prefill_ms": prefill_ms(shape, hardware, counts, dtype=dtype, pruned_layers=stages),
            "decode_ms": decode_ms(shape, hardware, counts, row["new_tokens"] - 1, dtype=dtype),
        }
        for name, value in predicted.items():
            if row.get(name):
                rows.append(
                    {"prompt_tokens": tokens, "method": row["method"], "what": name, "measured_ms": row[name],
                     "predicted_ms": value, "error_percent": 100 * (value / row[name] - 1)}
                )  # fmt: skip
    return rows


def _with_launches(kernels_ms: float, launches: int, hardware: Hardware) -> float:
    host = 1e-3 * launches * hardware.launch_us
    return max(kernels_ms, host) if hardware.asynchronous else kernels_ms + host


def _step_launches(shape: ModelShape) -> int:
    return shape.num_layers * LAUNCHES_PER_LAYER + 30


def _parser() -> argparse.ArgumentParser:
    parser = budget.counting_parser(
        "latency.cost_model", "Predict what pruning saves on a GPU: milliseconds of prefill and decode, memory. "
        "Nothing is measured; the rates of a GPU are its peaks times an efficiency.",
    )  # fmt: skip
    parser.add_argument("--hardware", nargs="+", choices=HARDWARE, default=list(HARDWARE), help="GPUs to predict for")
    parser.add_argument("--preset", default="keep09", help="preset of PruningConfig, for its layers and ratio")
    parser.add_argument("--new-tokens", type=int, default=128, metavar="N", help="tokens generated after the prompt")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a sentence per GPU and prompt length."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        shape = ModelShape.of(given.model)
        config = PruningConfig.preset(given.preset, shape.num_layers)
        element_bytes(given.dtype)
    except ValueError as error:
        parser.error(str(error))
    print(f"{given.model}, {given.preset}, {given.new_tokens} new tokens, {given.dtype}")
    for name in given.hardware:
        for tokens in given.prompt_tokens:
            found = predict(shape, HARDWARE[name], config, tokens, new_tokens=given.new_tokens, dtype=given.dtype)
            print(sentence(found))


if __name__ == "__main__":
    main()
