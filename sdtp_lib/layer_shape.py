"""`LayerShape`: what one decoder layer costs, counted from the layer's own weights.

Knows modules only by their attributes (``in_features``, ``num_heads``, ...): no torch, no transformers is imported, and
weights on the meta device, quantised or offloaded count alike. What it cannot count for certain it refuses by name:
a wrong count would look like a right one. Axis letters: D hidden size, H heads, d head size, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Set
from typing import Any

REMEDY = "its FLOPs are not known here; leave out what needs them, or teach sdtp_lib/layer_shape.py this part"
# By the part of the attention that is asked; the first name that a module or the configuration has counts.
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "num_q_heads", "head_num")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads", "kv_n_heads")
_KEY_PROJECTIONS, _FUSED_PROJECTIONS = ("k_proj", "key", "k_lin"), ("qkv", "query_key_value", "c_attn")
_QUERY_KEY_SIZE = ("qk_head_dim", "head_dim", "head_size", "attention_head_size", "hidden_size_per_attention_head")
_CHOSEN_EXPERTS = ("top_k", "num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "top_k_experts",
                   "num_experts_per_token")  # fmt: skip
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# An attention with one of these parts is not softmax(QK)V over all keys: a sparse index, differential attention.
_OTHER_ATTENTION = ("indexer", "lambda_q1")
# Parts of a layer whose FLOPs are not those of all their weights -> why: Gemma 3n's streams multiply activations with
# each other; of what Zamba's layers share, each uses adapters of its own.
_UNCOUNTED = {
    "altup": "whose products are not all of weights",
    **dict.fromkeys(("shared_transformer", "shared_transf"), "of which it uses only some weights"),
}
_FULL_ATTENTION = ("full_attention", "attention", "global")
# Words for layers that keep a state of all tokens; for layers that do so beside attention; for layers without either.
_WITH_STATE = ("linear_attention", "conv", "mamba", "mamba2", "recurrent")
_WITH_BOTH, _WITH_NEITHER = ("hybrid", "hybrid_sliding"), ("mlp", "moe")
# A configuration's words for how often a forward runs its inner layers (Dory, Ouro).
_LOOPS = ("n_recurrent_loops", "loop_num_passes", "num_loops", "total_ut_steps")


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """One decoder layer, in elements per token.

    Attributes
    ----------
    matmul_weights
        Weights that a token is multiplied with, 2 FLOPs each: of a mixture of experts the chosen and the shared ones
        and the router.
    parameters
        All weights that the layer holds.
    idle_weights
        Weights of experts that a token does not meet.
    state_flops
        FLOPs of a token in the state of a linear attention or of Mamba, beside its projections; such a layer alone has
        no heads and no keys.
    num_heads, num_kv_heads
        Query heads, and heads whose keys and values are cached.
    key_size, value_size
        Size of a query or key head, and of a value head: not the same in multi-head latent attention (MLA).
    cache_width
        Width of a token's keys and values in the cache; of MLA's latents where these are cached.
    inner_width
        Inner width of a gated feed-forward part of as many active weights (three matrices of D by it).
    window
        Tokens that the layer sees at most, its own included; None for all.
    """

    matmul_weights: int
    parameters: int
    num_heads: int
    num_kv_heads: int
    key_size: int
    value_size: int
    cache_width: int
    inner_width: int
    window: int | None = None
    idle_weights: int = 0
    state_flops: int = 0

    @property
    def query_width(self) -> int:
        """Width of all queries of a token."""
        return self.num_heads * self.key_size

    @property
    def flops_per_pair(self) -> int:
        """FLOPs of one query and key, over all heads: the score and the weighted value."""
        return 2 * self.num_heads * (self.key_size + self.value_size)


def loops_of(config: Any) -> str:
    """``"n_recurrent_loops=2"`` where a forward runs its layers more than once, else empty."""
    loops = _number([config], _LOOPS) or 1
    return next(f"{name}={loops}" for name in _LOOPS if getattr(config, name, None) == loops) if loops > 1 else ""


def count_layer(layer: Any, config: Any, index: int) -> LayerShape:
    """The `LayerShape` of decoder layer ``index``, a torch module of a model with this (text) configuration.

    Raises
    ------
    ValueError
        For a part that is neither a matrix product, softmax attention nor a known state (a sparse index, say), and for
        heads that do not fit the projections; the message names it.
    """
    where = f"{getattr(config, 'model_type', '')} layer {index} ({type(layer).__name__})"
    if loops := loops_of(config):
        raise ValueError(f"{where} runs more than once per forward ({loops}): {REMEDY}.")
    kind = layer_kind(config, index)
    for part, why in _UNCOUNTED.items():
        if hasattr(layer, part):
            raise ValueError(f"{where} has the part {part!r}, {why}: {REMEDY}.")
    if any(_is_table(part) for part in layer.modules()):
        raise ValueError(f"{where} looks weights up in a table: {REMEDY}.")
    path, window, heads, key_heads, key_size, value_size, cache_width = "", None, 0, 0, 0, 0, 0
    if kind not in (*_WITH_STATE, *_WITH_NEITHER):
        window = layer_window(config, index, where)
        path, attention = _attention_of(layer, where)
        heads, key_heads, key_size, value_size = _head_sizes(attention, config, where)
        latent = hasattr(attention, "expand_kv")
        cache_width = key_heads * (key_size + value_size)
        cache_width = attention.kv_lora_rank + attention.qk_rope_head_dim if latent else cache_width
    parts = list(matmul_parts(layer, config, where))
    feed_forward = sum(active for name, active, _ in parts if not path or not name.startswith(f"{path}."))
    return LayerShape(
        matmul_weights=sum(active for _, active, _ in parts),
        parameters=held_parameters(layer),
        num_heads=heads,
        num_kv_heads=key_heads,
        key_size=key_size,
        value_size=value_size,
        cache_width=cache_width,
        inner_width=round(feed_forward / (3 * config.hidden_size)),
        window=window,
        idle_weights=sum(held - active for _, active, held in parts),
        state_flops=_state_flops(layer, where) if kind in (*_WITH_STATE, *_WITH_BOTH) else 0,
    )


def layer_kind(config: Any, index: int) -> str | None:
    """The configuration's word for layer ``index``; None where it has none."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    return kinds[index] if kinds else None


def _state_flops(layer: Any, where: str) -> int:
    """FLOPs of one token in the state that a layer keeps: what it adds to each number of it, and reads out of it.

    2 each, whatever the chunks in which a kernel does it; 2 more where the state is first asked what it already says of
    the token's key (the delta rule). Example: 4 heads with a state of 8 x 8 under the delta rule: 4 * 64 * 6 = 1,536.
    """
    for part in layer.modules():
        if hasattr(part, "head_k_dim") and hasattr(part, "num_v_heads"):  # gated delta net
            return 6 * part.num_v_heads * part.head_k_dim * part.head_v_dim
        if hasattr(part, "forget_gate") and hasattr(part, "qkv_dim"):  # Kimi's delta attention
            return 6 * part.num_heads * part.head_dim**2
        if hasattr(part, "ssm_state_size"):  # Mamba 2, and Mamba without heads
            heads = getattr(part, "num_heads", None)
            return 4 * part.ssm_state_size * (heads * part.head_dim if heads else part.intermediate_size)
        if hasattr(part, "slope_rate"):  # MiniMax's lightning attention
            return 4 * part.num_attention_heads * part.head_dim**2
        if hasattr(part, "conv") and not hasattr(part, "conv1d"):  # a short convolution alone, which is counted as such
            return 0
    raise ValueError(f"{where} keeps a state of a kind that is not known: {REMEDY}.")


def matmul_parts(module: Any, config: Any, where: str, skip: Set[int] = frozenset()) -> Iterator[tuple[str, int, int]]:
    """Path, active and all weights of each matrix inside ``module``; ``skip`` has ids of modules to leave out."""
    for path, part in module.named_modules():
        if id(part) in skip or path.endswith("pooler"):  # a classifier's part, which no causal LM calls
            continue
        size = linear_size(part)
        share = _active_share(module, path, part, config, where)
        if size is not None:
            yield f"{path}.", round(share * size), size
            continue
        own = dict(part.named_parameters(recurse=False))
        stacked = any(weight.dim() == 3 for weight in own.values())
        for name, weight in own.items():
            # Norms, sinks and biases are vectors; the biases of stacked experts are (E, out).
            vector = weight.dim() == (2 if stacked else 1) or weight.numel() in (0, max(weight.shape, default=0))
            if vector or _is_table(part) or name == "A_log":  # of Mamba: it multiplies the state number by number
                continue
            if getattr(part, "groups", 1) == weight.shape[0] and weight.dim() == 3:  # each channel's own convolution
                yield f"{path}.{name}", weight.numel(), weight.numel()
                continue
            if share == 1 and (weight.dim() > 2 or name != "weight"):
                raise ValueError(f"{where}: {path}.{name} {tuple(weight.shape)} is not a plain matrix: {REMEDY}.")
            yield f"{path}.{name}", round(share * weight.numel()), weight.numel()


def linear_size(module: Any) -> int | None:
    """Weights of a linear layer by its sizes, so that packed (quantised) weights count as what they stand for."""
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(sizes[0], int) and isinstance(sizes[1], int) and not list(module.named_children()):
        return sizes[0] * sizes[1]
    # GPT-2's Conv1D is a transposed linear layer.
    if type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int):
        return module.weight.numel()
    return None


def held_parameters(module: Any, seen: set[int] | None = None) -> int:
    """All weights inside ``module``, shared ones once; packed weights count as what they stand for."""
    seen, total = set() if seen is None else seen, 0
    for part in module.modules():
        size = linear_size(part)
        for name, weight in part.named_parameters(recurse=False):
            if id(weight) not in seen:
                seen.add(id(weight))
                total += size if size is not None and name == "weight" else weight.numel()
    return total


def layer_window(config: Any, index: int, where: str) -> int | None:
    """Tokens that layer ``index`` sees at most, or None; a layer type without softmax attention is refused."""
    kind, window = layer_kind(config, index), getattr(config, "sliding_window", None)
    if kind in ("sliding_attention", "hybrid_sliding") or (kind is None and window):
        return int(window)
    if kind is not None and kind not in (*_FULL_ATTENTION, *_WITH_BOTH):
        raise ValueError(f"{where} is of the type {kind!r}, not full or sliding attention: {REMEDY}.")
    return None


def _active_share(module: Any, path: str, part: Any, config: Any, where: str) -> float:
    """Which share of the weights at ``path`` a token meets: chosen over all inside the routed experts, else 1."""
    # JetMoe and its kin stack the experts of each projection: "...ParallelExperts".
    names = path.split(".") if "ParallelExperts" not in type(part).__name__ else [*path.split(".")[:-1], "experts"]
    depth = names.index("experts") if "experts" in names else len(names)
    # A linear layer beside the stacked experts (not one in a list of them) is the router's.
    if depth == len(names) or (linear_size(part) is not None and not "".join(names[depth + 1 : depth + 2]).isdigit()):
        return 1
    block = module.get_submodule(".".join(names[:depth]))
    experts = part if "ParallelExperts" in type(part).__name__ else module.get_submodule(".".join(names[: depth + 1]))
    total = len(experts) if hasattr(experts, "__len__") else _number([experts], _EXPERT_COUNTS)
    chosen = _number([*block.modules(), config], _CHOSEN_EXPERTS)
    if not total or not chosen:
        raise ValueError(f"{where}: how many of the experts at {path} a token meets is not said by "
                         f"{', '.join(_CHOSEN_EXPERTS)}: {REMEDY}.")  # fmt: skip
    return chosen / total


def _attention_of(layer: Any, where: str) -> tuple[str, Any]:
    """The one outermost attention module of a decoder layer, and its path."""
    found: dict[str, Any] = {}
    for path, module in layer.named_modules():
        named = any(part in type(module).__name__.lower() for part in ("attention", "attn"))
        projects = any(linear_size(part) is not None for part in module.modules())
        if path and named and projects and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = module
    if len(found) != 1:
        names = ", ".join(found) or "none"
        raise ValueError(f"{where} has {len(found)} attention modules ({names}), not one: {REMEDY}.")
    path, attention = next(iter(found.items()))
    if "cross" in f"{path}{type(attention).__name__}".lower():  # Mllama's layers for images, left out of a text
        raise ValueError(f"{where} attends to something else than its own tokens ({path}): {REMEDY}.")
    return path, attention


def _head_sizes(attention: Any, config: Any, where: str) -> tuple[int, int, int, int]:
    """Heads, cached heads, the size of a query or key head and that of a value head."""
    other = [name for name in _OTHER_ATTENTION if hasattr(attention, name)]
    if other:
        raise ValueError(f"{where}: attention with the part {other[0]!r} is not plain softmax attention: {REMEDY}.")
    places = [*attention.modules(), config]
    heads = _number(places, _HEADS)
    key_size = _number(places, _QUERY_KEY_SIZE) or (config.hidden_size // heads if heads else None)
    value_size = _number(places[:-1], ("v_head_dim",)) or key_size
    if heads is None:
        raise ValueError(f"{where}: its attention says no number of heads ({', '.join(_HEADS)}): {REMEDY}.")
    inputs = {part.in_features if hasattr(part, "in_features") else part.weight.shape[0]
              for part in attention.modules() if linear_size(part) is not None}  # fmt: skip
    if heads * value_size not in inputs:
        raise ValueError(f"{where}: no projection takes {heads} heads of {value_size} back to the hidden size, only "
                         f"widths {sorted(inputs)}: {REMEDY}.")  # fmt: skip
    if hasattr(attention, "kv_lora_rank"):  # multi-head latent attention has keys and values for every head
        return heads, heads, key_size, value_size
    key_heads = _cached_heads(attention, heads, key_size, value_size) or _number(places, _KEY_HEADS) or heads
    return heads, key_heads, key_size, value_size


def _cached_heads(attention: Any, heads: int, key_size: int, value_size: int) -> int | None:
    """Heads of keys and values by the width of their projection, which layers of one model may differ in."""
    for name, part in attention.named_modules():
        width, name = getattr(part, "out_features", None) or getattr(part, "nf", None), name.rpartition(".")[2].lower()
        if name in _KEY_PROJECTIONS and isinstance(width, int):
            return width // key_size
        if any(fused in name for fused in _FUSED_PROJECTIONS) and isinstance(width, int):
            return (width - heads * key_size) // (key_size + value_size)
    return None


def _is_table(module: Any) -> bool:
    return isinstance(getattr(module, "num_embeddings", None), int)


def _number(places: list[Any], names: tuple[str, ...]) -> int | None:
    """The first whole number, above zero, that one of ``places`` has under one of ``names``, names first."""
    for name in names:
        for place in places:
            value = getattr(place, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None
