"""What a cache of transformers holds: tokens seen, keys, lengths and bytes of each layer; and which caches are refused.

Part of the door to transformers' internals; knows cache layers, not decoder layers. Axes: B batch, G key-value heads.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from sdtp_lib.config import PruningNotSupported


def is_cache(value: Any) -> bool:
    """Whether ``value`` is a cache of keys and values, whatever the argument that carries it is called."""
    if hasattr(value, "get_seq_length") and hasattr(value, "update"):
        return True
    # The form of transformers 4: one tuple of tensors per layer. Position tables are tuples of tensors themselves.
    return isinstance(value, (tuple, list)) and bool(value) and isinstance(value[0], (tuple, list))


def cache_of(arguments: Mapping[str, Any]) -> Any | None:
    """The cache among a layer's or a model's arguments, or None. It is found by what it is: its name changes."""
    cache = next((value for value in arguments.values() if is_cache(value)), None)
    return getattr(cache, "self_attention_cache", cache)  # of a pair with cross-attention the decoder's own


def without_cache(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments less the cache."""
    return {name: value for name, value in arguments.items() if not is_cache(value)}


# What models call their cache: transformers 5.24 renamed it, and the old name goes in 5.40.
_MODEL_CACHE_NAMES = ("cache", "past_key_values")


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """``{name: cache}`` for ``model(...)`` or ``model.generate(...)``, by the name that this model has for it.

    transformers up to 5.23: ``past_key_values``; from 5.24 on: ``cache``, where the old name warns. Remote code may
    have either under any release; a wrapper that takes anything (PEFT) hands it on, so the release's own name is right.
    """
    named = _takes(type(model)) or _takes(GenerationMixin, "prepare_inputs_for_generation")
    return {named or _MODEL_CACHE_NAMES[-1]: cache}


def cache_in(output: Any) -> Any | None:
    """The cache that a model's output holds, under either name; None without one."""
    # The new name first: where it exists, asking for the old one warns.
    return getattr(output, "cache" if hasattr(output, "cache") else "past_key_values", None)


@functools.cache
def _takes(owner: type, method: str = "forward") -> str | None:
    taken = inspect.signature(getattr(owner, method)).parameters
    return next((name for name in _MODEL_CACHE_NAMES if name in taken), None)


def tokens_seen(cache: Any | None) -> int:
    """Tokens in the cache before this pass: the length of layer 0, which is never pruned."""
    return 0 if cache is None else int(cache.get_seq_length())


def cached_tokens(cache: Any, layer_index: int) -> int:
    """Tokens that layer ``layer_index`` has cached so far (a sliding layer counts those it has let go, too)."""
    layers = getattr(cache, "layers", None)
    if layers is not None and layer_index >= len(layers):
        return 0
    return int(cache.get_seq_length(layer_index))


def cached_keys(cache: Any | None, layer_index: int, tokens: int) -> torch.Tensor | None:
    """The keys (B, G, tokens, head size) just cached by ``layer_index``, or None where it holds others."""
    layers = getattr(cache, "layers", None) or ()
    keys = getattr(layers[layer_index], "keys", None) if 0 <= layer_index < len(layers) else None
    return keys if torch.is_tensor(keys) and keys.dim() == 4 and keys.shape[2] == tokens else None


def cached_past(cache: Any, layer_index: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Keys and values (B, G, S, d) that ``layer_index`` holds before it runs; None where they cannot be read."""
    layers = getattr(cache, "layers", None) or ()
    layer = layers[layer_index] if layer_index < len(layers) else None
    if layer is None or getattr(layer, "_quantized_keys", None) is not None:
        return None
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    return (keys, values) if torch.is_tensor(keys) and keys.dim() == 4 else None


def attended_keys(cache: Any, layer_index: int, cached: int, new_tokens: int) -> int:
    """Keys that attention at ``layer_index`` sees when ``new_tokens`` come after ``cached`` ones: the last so many."""
    layers = getattr(cache, "layers", None) or ()
    layer = layers[layer_index] if layer_index < len(layers) else None
    if getattr(layer, "is_sliding", False):
        window = getattr(layer, "sliding_window", None) or getattr(layer, "max_cache_len", cached + 1)
        cached = min(cached, int(window) - 1)
    return cached + new_tokens


def hold_longer(cache: Any, layer_index: int, tokens: int) -> bool:
    """Let a layer with a sliding window keep ``tokens`` more from its next update on (negative: fewer again).

    For keys that are to be taken away again: by then the window would have let go of older ones. Whether it is one.
    """
    layers = getattr(cache, "layers", None) or ()
    layer = layers[layer_index] if layer_index < len(layers) else None
    if not getattr(layer, "is_sliding", False):
        return False
    layer.sliding_window += tokens
    return True


def keys_can_be_taken_out(cache: Any) -> bool:
    """Whether every layer of ``cache`` keeps its keys and values as tensors, in place: none quantised or offloaded."""
    held = [type(layer) for layer in getattr(cache, "layers", None) or ()]
    held += [kind] if (kind := getattr(cache, "layer_class_to_replicate", None)) is not None else []
    plain = all(kind.__name__ in ("DynamicLayer", "DynamicSlidingWindowLayer") for kind in held)
    return plain and not getattr(cache, "offloading", False)


def drop_last(cache: Any, tokens: int) -> None:
    """Take the last ``tokens`` keys and values out of each layer, which then is as if it had never seen them.

    Layers with a sliding window must have been told to `hold_longer`, and be back at their own window.
    """
    for layer in cache.layers:
        if not _layer_length(layer):
            continue
        most = layer.sliding_window - 1 if getattr(layer, "is_sliding", False) else None
        for name in ("keys", "values"):
            left = getattr(layer, name)[..., :-tokens, :]
            setattr(layer, name, left if most is None else left[..., max(0, left.shape[-2] - most) :, :])
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length -= tokens


def layer_states(cache: Any) -> list[dict[str, Any]]:
    """What each layer holds: ``keys, values`` (None where it is empty), ``window`` (None without), ``seen`` tokens."""
    found = []
    for layer in cache.layers:
        full = _layer_length(layer) > 0
        window = int(layer.sliding_window) if getattr(layer, "is_sliding", False) else None
        found.append({
            "keys": layer.keys if full else None, "values": layer.values if full else None, "window": window,
            "seen": int(layer.get_seq_length()),
        })  # fmt: skip
    return found


def cache_from(states: Sequence[Mapping[str, Any]]) -> DynamicCache:
    """A dynamic cache that holds ``states``, as `layer_states` gives them."""
    cache = DynamicCache()
    cache.layers = []
    for state in states:
        window = state["window"]
        layer = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
        if state["keys"] is not None:
            layer.update(state["keys"], state["values"])
            if window is not None:
                layer.cumulative_length = state["seen"]
        cache.layers.append(layer)
    return cache


def refuse_cache(cache: Any) -> None:
    """Raise `PruningNotSupported` for a cache whose layers cannot differ in length."""
    layers = getattr(cache, "layers", None)
    if layers is None and not hasattr(cache, "get_seq_length"):
        raise PruningNotSupported(
            f"past_key_values={type(cache).__name__} is not a transformers Cache: use DynamicCache(config=...)."
        )
    # A layer with a state is of one size whatever it was given, and one without either holds nothing.
    with_keys = [
        layer for layer in layers or ()
        if isinstance(layer, CacheLayerMixin) and not hasattr(layer, "update_recurrent_state")
    ]  # fmt: skip
    static = any(getattr(layer, "is_compileable", False) for layer in with_keys)
    if static or getattr(cache, "is_compileable", False):
        raise PruningNotSupported(
            f"past_key_values={type(cache).__name__} is a static cache, one length for all layers: use a dynamic cache "
            "(cache_implementation='dynamic', or none)."
        )


def cache_lengths(past_key_values: Any) -> list[int]:
    """Keys that each layer of a cache holds in memory."""
    return [_layer_length(layer) for layer in past_key_values.layers]


def _layer_length(layer: Any) -> int:
    if getattr(layer, "_quantized_keys", None) is not None:  # its ``keys`` are the unquantised rest only
        return int(layer.get_seq_length())
    keys = getattr(layer, "keys", None)
    return int(keys.shape[-2]) if keys is not None and keys.numel() else 0


def kv_bytes(past_key_values: Any) -> list[int]:
    """Bytes of keys and values that each layer of a cache holds, unquantised tensors only."""
    return [
        sum(t.nbytes for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if torch.is_tensor(t))
        for layer in past_key_values.layers
    ]
