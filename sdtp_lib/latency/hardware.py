"""Micro-benchmarks of one device: the rates it really reaches, which `cost_model` predicts from.

Times single operations of a model's sizes (matrix products, causal attention, streaming, launches) and knows nothing of
the model itself, pruning or predictions.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from sdtp_lib.latency.measure import Stopwatch, synchronise
from sdtp_lib.model_shape import ModelShape


def measure_hardware(
    shape: ModelShape,
    *,
    tokens: int = 2048,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    repeats: int = 5,
) -> dict[str, float | bool]:
    """Achieved rates for operations of the sizes of a model and prompt, medians.

    Returns
    -------
    dict
        ``matmul_tflops`` (T x D by D x F and back), ``attention_tflops`` (causal, 2 T^2 H d), ``bandwidth_gb_s``
        (a product of one row with a large matrix), ``elementwise_gb_s`` (a norm, a residual and a gated activation, by
        the bytes that `cost_model.elementwise_bytes` counts), ``launch_us`` (an operation of a tiny module, Python
        included), ``cache_passes`` (growing a cache by a token and attending to it, in passes over it at that
        bandwidth), ``asynchronous``.
    """
    hidden_size, intermediate_size = shape.hidden_size, shape.intermediate_size
    num_heads, head_dim, groups = shape.num_heads, shape.head_dim, shape.num_kv_heads
    options = {"dtype": dtype, "device": device}
    size = torch.empty((), dtype=dtype).element_size()
    hidden, inner = torch.randn(tokens, hidden_size, **options), torch.randn(tokens, intermediate_size, **options)
    up = torch.randn(intermediate_size, hidden_size, **options)
    down = torch.randn(hidden_size, intermediate_size, **options)
    query = torch.randn(1, num_heads, tokens, head_dim, **options)
    row = torch.randn(1, hidden_size, **options)
    # Large enough that no cache holds it.
    table = torch.randn(max(1, 256_000_000 // (size * hidden_size)), hidden_size, **options)
    cached = 2 * groups * tokens * head_dim * size
    # As many layers' caches as no processor cache holds.
    caches = itertools.cycle(torch.randn(max(2, 64_000_000 // cached), 2, 1, groups, tokens, head_dim, **options))
    token, query = torch.randn(1, groups, 1, head_dim, **options), torch.randn(1, num_heads, 1, head_dim, **options)
    tiny, module = torch.ones(1, 1, 8, **options), torch.nn.Linear(8, 8, **options)

    def products() -> None:
        functional.linear(hidden, up)
        functional.linear(inner, down)

    def attention() -> None:
        functional.scaled_dot_product_attention(query, query, query, is_causal=True)

    def elementwise() -> None:
        hidden + hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6) * row
        functional.silu(inner) * inner

    def grow() -> None:
        keys, values = (torch.cat([old, token], dim=2) for old in next(caches))
        functional.scaled_dot_product_attention(query, keys, values, enable_gqa=groups != num_heads)

    def four_operations() -> None:
        tiny + module(tiny).view(1, 8, 1).transpose(1, 2)

    with torch.inference_mode():
        product_s = _median_seconds(products, device, repeats)
        attention_s = _median_seconds(attention, device, repeats)
        row_s = _median_seconds(lambda: functional.linear(row, table), device, repeats)
        elementwise_s = _median_seconds(elementwise, device, repeats)
        grow_s = _median_seconds(grow, device, repeats)
        launch_s = _seconds_a_launch(four_operations, device) / 4
    moved = size * tokens * (11 * hidden_size + 5 * intermediate_size)
    bandwidth = table.nbytes / row_s
    return {
        "matmul_tflops": 1e-12 * 4 * tokens * hidden_size * intermediate_size / product_s,
        "attention_tflops": 1e-12 * 2 * tokens * tokens * num_heads * head_dim / attention_s,
        "bandwidth_gb_s": 1e-9 * bandwidth,
        "elementwise_gb_s": 1e-9 * moved / elementwise_s,
        "launch_us": 1e6 * launch_s,
        "cache_passes": grow_s * bandwidth / cached,
        "asynchronous": torch.device(device).type == "cuda",
    }


def _median_seconds(call: Callable[[], object], device: torch.device | str, repeats: int) -> float:
    times = []
    for repetition in range(-2, repeats):
        watch = Stopwatch(device)
        # Ten calls per measurement, as a model would run one layer after the other.
        for _ in range(10):
            call()
        watch.mark("calls")
        if repetition >= 0:
            times.append(watch.parts_ms()["calls"] / 1e4)
    return statistics.median(times)


def _seconds_a_launch(call: Callable[[], object], device: torch.device | str, launches: int = 2000) -> float:
    """Host seconds to queue one operation; the device is not waited for in between."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(launches):
        call()
    elapsed = time.perf_counter() - start
    synchronise(device)
    return elapsed / launches
