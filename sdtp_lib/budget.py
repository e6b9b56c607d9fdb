"""What a pruning configuration costs and saves: tokens a layer, 1/tau, FLOPs, KV bytes.

Pure functions of a `PruningConfig` and a `ModelShape`: no torch, no model in memory, nothing measured. The engine asks
`keep_count` here, so the plan and the execution cannot drift apart.

Axis letters: T prompt tokens, K kept tokens, D hidden size, L layers. ``tokens_per_layer`` has L entries, the tokens
that each decoder layer computes. FLOPs count a multiply-add as 2; norms, rotary positions, softmax and activations
are left out (below 1 %).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from sdtp_lib.model_shape import ModelShape

if TYPE_CHECKING:
    from sdtp_lib.config import PruningConfig

CONVENTIONS = ("model", "paper")


def protected_count(tokens: int, config: PruningConfig) -> int:
    """How many of ``tokens`` alive tokens may never be dropped: the sinks and the local end, counted once each."""
    local = max(config.min_local_tokens, math.ceil(config.local_ratio * tokens))
    return min(tokens, config.sink_tokens + local)


def keep_count(tokens: int, keep_ratio: float, config: PruningConfig) -> int:
    """How many of ``tokens`` alive tokens of a row stay at a stage: ``min(n, max(floor(r n + 1e-9), protected))``."""
    # 1e-9: 0.7 * 10 is 6.999.. in binary, and 7 tokens are meant.
    return min(tokens, max(math.floor(keep_ratio * tokens + 1e-9), protected_count(tokens, config)))


def tokens_per_layer(config: PruningConfig | None, num_layers: int, prompt_tokens: int) -> list[int]:
    """Tokens that each of ``num_layers`` layers computes in the prefill of ``prompt_tokens``; ``None`` prunes nothing.

    Raises
    ------
    ValueError
        If the configuration names a layer that the model does not have.
    """
    if config is not None:
        config.validate_for(num_layers)
    alive, counts = prompt_tokens, []
    for layer in range(num_layers):
        if config is not None and layer in config.layers:
            alive = keep_count(alive, config.ratio_at(layer), config)
        counts.append(alive)
    return counts


def compression_ratio(tokens_per_layer: Sequence[float]) -> float:
    """The paper's 1/tau: prompt tokens over the mean number of tokens a layer (layer 0 computes all of them)."""
    return tokens_per_layer[0] * len(tokens_per_layer) / sum(tokens_per_layer)


def prefill_flops(
    shape: ModelShape,
    tokens_per_layer: Sequence[int],
    *,
    causal: bool = True,
    convention: str = "model",
    logits_positions: int = 1,
    pruner_flops: float = 0,
) -> float:
    """FLOPs of one prefill (batch 1).

    Parameters
    ----------
    causal
        Count the half of the attention products that a causal kernel computes (2 n^2 D a layer); ``False`` counts the
        full square, as eager attention computes it.
    convention
        ``"model"`` counts this model. ``"paper"`` is the formula behind Table 2 of arXiv 2504.04514,
        ``sum_l 2 n_l (4 D^2 + 3 D F) + 3 n_l^2 D``, plus ``2 T * 2 V D``: no grouped heads, 1.5 times causal
        attention, embedding and head as matmuls over all T tokens; it ignores ``causal`` and ``logits_positions``.
    logits_positions
        Positions for which the head computes logits: 1 in a prefill that is there to generate.
    pruner_flops
        What scoring the tokens costs on top, see `pruner_flops`.
    """
    _check_layers(shape, tokens_per_layer)
    if convention not in CONVENTIONS:
        raise ValueError(f"convention={convention!r} is unknown: choose one of {', '.join(CONVENTIONS)}.")
    linear, squares = sum(tokens_per_layer), sum(n * n for n in tokens_per_layer)
    if convention == "paper":
        matrices = (
            4 * shape.hidden_size**2 + (3 if shape.gated_mlp else 2) * shape.hidden_size * shape.intermediate_size
        )
        tables = 2 * shape.vocab_size * shape.hidden_size
        return 2 * linear * matrices + 3 * squares * shape.hidden_size + 2 * tokens_per_layer[0] * tables + pruner_flops
    attention = (2 if causal else 4) * squares * shape.query_width
    head = 2 * logits_positions * shape.vocab_size * shape.hidden_size
    return 2 * linear * shape.layer_matmul_weights + attention + head + pruner_flops


def decode_flops(shape: ModelShape, kv_lengths_per_layer: Sequence[int], new_tokens: int) -> float:
    """FLOPs of ``new_tokens`` one-token forwards on a cache that holds ``kv_lengths_per_layer`` keys before the first.

    The first generated token comes from the prefill: ``generate(max_new_tokens=128)`` runs 127 of these forwards.
    """
    _check_layers(shape, kv_lengths_per_layer)
    matrices = 2 * (shape.num_layers * shape.layer_matmul_weights + shape.vocab_size * shape.hidden_size)
    # Forward i (1-based) attends to the cache, the i - 1 tokens generated before it, and itself.
    keys = new_tokens * sum(kv_lengths_per_layer) + shape.num_layers * new_tokens * (new_tokens + 1) // 2
    return new_tokens * matrices + 4 * keys * shape.query_width


def kv_bytes(shape: ModelShape, tokens_per_layer: Iterable[int], bytes_per_element: int) -> int:
    """Bytes of the keys and values of a cache with these lengths (batch 1)."""
    return 2 * shape.key_width * bytes_per_element * sum(tokens_per_layer)


def pruner_flops(
    hidden_size: int, layers: Iterable[int], tokens_per_layer: Sequence[int], width: int | None = None
) -> float:
    """FLOPs of the token pruners D -> width -> 1 (width D/4 unless told), each on the tokens that reach its stage."""
    width = hidden_size // 4 if width is None else width
    return sum(2 * tokens_per_layer[layer - 1] * (hidden_size * width + width) for layer in layers)


def speedup_limit(
    shape: ModelShape, config: PruningConfig, prompt_tokens: int, *, causal: bool = True, pruner_width: int | None = 0
) -> float:
    """Full over pruned prefill FLOPs: the speed-up that a prefill limited by its FLOPs cannot exceed.

    ``pruner_width=0`` leaves the pruners out (the limit of the idea), ``None`` counts the default MLPs.
    """
    pruned = tokens_per_layer(config, shape.num_layers, prompt_tokens)
    scoring = 0 if pruner_width == 0 else pruner_flops(shape.hidden_size, config.layers, pruned, pruner_width)
    full = prefill_flops(shape, [prompt_tokens] * shape.num_layers, causal=causal)
    return full / prefill_flops(shape, pruned, causal=causal, pruner_flops=scoring)


def find_keep_ratio(
    shape: ModelShape,
    config: PruningConfig,
    prompt_tokens: int,
    *,
    speedup: float | None = None,
    final_tokens: int | None = None,
    mean_tokens: float | None = None,
) -> float:
    """The largest keep ratio, one for all stages, that reaches one target.

    Parameters
    ----------
    speedup
        At least this ratio of causal prefill FLOPs.
    final_tokens
        At most this many tokens in the last layer.
    mean_tokens
        At most this many tokens a layer on average.

    Raises
    ------
    ValueError
        If not exactly one target is given, or if the protected tokens alone already miss it.
    """
    targets = {"speedup": speedup, "final_tokens": final_tokens, "mean_tokens": mean_tokens}
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"give exactly one of {', '.join(targets)}; given: {sorted(given) or 'none'}.")
    ((name, target),) = given.items()

    def reaches(ratio: float) -> bool:
        candidate = config.replace(keep_ratio=ratio)
        counts = tokens_per_layer(candidate, shape.num_layers, prompt_tokens)
        if name == "final_tokens":
            return counts[-1] <= target
        if name == "mean_tokens":
            return sum(counts) / len(counts) <= target
        return speedup_limit(shape, candidate, prompt_tokens) >= target

    low, high = 1e-6, 1.0
    if reaches(high):
        return high
    if not reaches(low):
        raise ValueError(
            f"{name}={target} cannot be reached with layers={list(config.layers)} and the protected tokens "
            f"(sink_tokens={config.sink_tokens}, local_ratio={config.local_ratio}): prune earlier or protect less."
        )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if reaches(middle) else (low, middle)
    return low


def _check_layers(shape: ModelShape, per_layer: Sequence[int]) -> None:
    if len(per_layer) != shape.num_layers:
        raise ValueError(f"{len(per_layer)} entries for {shape.num_layers} layers: give the tokens of every layer.")
