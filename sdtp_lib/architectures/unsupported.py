"""Which models pruning cannot serve, and why: refused on entry, by what a model and its layers are.

Where possible the answer comes from transformers: the cache that it would make for a model says for each layer whether
it holds keys and values, which may be of fewer tokens, or something else (a state of all tokens, say), which cannot be
pruned.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from sdtp_lib.config import PruningNotSupported
from sdtp_lib.layer_shape import loops_of

# Early releases of transformers make no cache layer of its own for these: there only the configuration tells.
_KINDS_WITH_STATE = {"linear_attention", "conv", "mamba", "mamba2", "recurrent", "hybrid"}
_KEYS_AND_VALUES = ("DynamicLayer", "DynamicSlidingWindowLayer")
_STATE = "LinearAttentionLayer"  # a state of what the layer was given, and nothing else: of kept tokens, if those are
_BOTH = ("LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer")
_NEITHER = ("mlp", "moe")  # words for layers that treat each token by itself, for which a cache holds nothing
_REMEDY = "use a model whose layers all have full or sliding attention"


def refuse_object(model: Any) -> None:
    """Raise `PruningNotSupported` for anything but a causal LM of transformers that runs as it stands."""
    name = type(model).__name__
    if isinstance(model, type):
        raise PruningNotSupported(
            f"model={model.__name__} is a class: give a loaded model, {model.__name__}.from_pretrained(...)."
        )
    if isinstance(model, (str, os.PathLike)):
        raise PruningNotSupported(
            f"model={str(model)!r} is a name: load the model first, model, tokenizer = load_model({str(model)!r})."
        )
    if isinstance(model, tuple):
        raise PruningNotSupported("model is a tuple, such as load_model returns: model, tokenizer = load_model(...).")
    if not isinstance(model, nn.Module):
        inside = isinstance(getattr(model, "model", None), nn.Module)
        remedy = "give the model inside, pipeline.model" if inside else "give a causal LM of transformers"
        raise PruningNotSupported(f"model is a {name}{', a pipeline' if inside else ''}: {remedy}.")
    if any(map(_is_compiled, model.modules())):
        raise PruningNotSupported(
            f"{name} or a module in it is compiled with torch.compile, which would freeze the tokens of each layer "
            "or run without pruning: prune the model that was given to torch.compile."
        )
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        wrapped = hasattr(getattr(model, "module", None), "config")
        remedy = f"give the model inside, {name}.module" if wrapped else "give a causal LM of transformers"
        raise PruningNotSupported(f"{name} has no transformers configuration: {remedy}.")
    _refuse_virtual_tokens(model)


def _is_compiled(module: nn.Module) -> bool:
    """``torch.compile`` of the module, its call or its forward: code made before a `with` knows no hooks."""
    forward = getattr(module.forward, "__func__", module.forward)
    return (
        hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        or (hasattr(forward, "_torchdynamo_orig_callable") and not getattr(forward, "_torchdynamo_disable", False))
    )


def _refuse_virtual_tokens(model: nn.Module) -> None:
    """PEFT's prompt learning puts tokens, or their keys, before the prompt; LoRA and its kin change weights only."""
    adapters = getattr(model, "peft_config", None)
    adapter = getattr(model, "active_adapter", None)
    if not isinstance(adapters, dict) or not isinstance(adapter, str) or getattr(model, "_adapters_disabled", False):
        return
    if getattr(adapters.get(adapter), "is_prompt_learning", False):
        kind = getattr(adapters[adapter].peft_type, "value", adapters[adapter].peft_type)
        raise PruningNotSupported(
            f"the active adapter {adapter!r} is of PEFT's kind {kind}, whose virtual tokens before the prompt would be "
            "taken for it: use an adapter that changes weights, such as LoRA, or prune model.get_base_model()."
        )


def refuse_kind(model: nn.Module) -> None:
    """Raise `PruningNotSupported` for a kind of model that no way of cutting its layers' inputs can serve."""
    name, config = type(model).__name__, model.config
    if getattr(config, "is_encoder_decoder", False):
        raise PruningNotSupported(f"{name} is an encoder-decoder: token pruning serves decoder-only language models.")
    text_config = config.get_text_config()
    kinds = _layer_kinds(text_config)
    if loops := loops_of(text_config):
        raise PruningNotSupported(
            f"{name} runs its layers more than once per forward ({loops}): a token dropped before a layer would be "
            "missing where that layer begins again. Use a model that runs each layer once."
        )
    cache_layers, with_state = _cache_layers(text_config), state_layers(text_config)
    if cache_layers and len(with_state) == len(cache_layers):
        _refuse_state(name)
    for index, cache_layer in enumerate(cache_layers):
        _refuse_cache_layer(f"{name}: decoder layer {index}", kinds[index : index + 1], cache_layer)
    known = with_state | mixed_layers(text_config)
    for index, kind in enumerate(kinds):
        if kind in _KINDS_WITH_STATE and index not in known:
            _refuse_state(f"{name}: decoder layer {index} ({kind})")
    if getattr(model, "_is_stateful", False) and not kinds:
        _refuse_state(name)
    if getattr(text_config, "index_topk", None) and not kinds:
        _refuse_index(f"{name} (index_topk={text_config.index_topk})")
    if text_config is config and getattr(config, "vision_config", None) is not None:
        raise PruningNotSupported(
            f"{name} is a multimodal model that takes images into the layers of its language model, where they cannot "
            "be told from text: give a language model."
        )


def state_layers(config: Any) -> frozenset[int]:
    """Layers without keys: of what they are given they keep one state (linear attention, Mamba, convolutions), or none.

    Given kept tokens only, such a layer computes what it would in a prompt of these tokens.
    """
    kinds, layers = _layer_kinds(config), _cache_layers(config)
    alone = {index for index, kind in enumerate(kinds) if kind in _NEITHER and len(kinds) == len(layers)}
    return frozenset(alone | {index for index, layer in enumerate(layers) if type(layer).__name__ == _STATE})


def mixed_layers(config: Any) -> frozenset[int]:
    """Layers that keep a state and keys, side by side (Falcon H1)."""
    return frozenset(index for index, layer in enumerate(_cache_layers(config)) if type(layer).__name__ in _BOTH)


def _layer_kinds(config: Any) -> list[str]:
    """The configuration's own word for each layer; empty where it has none."""
    return list(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())


def _cache_layers(config: Any) -> list[Any]:
    try:
        return list(DynamicCache(config=config).layers)
    except (AttributeError, KeyError, TypeError, ValueError):
        return []  # no cache can be made from this configuration alone (remote code): the layers will tell


def _refuse_cache_layer(where: str, kind: list[str], cache_layer: Any) -> None:
    """Refuse a layer whose cache holds anything but the keys and values of its own tokens."""
    held = type(cache_layer).__name__
    if held in (*_KEYS_AND_VALUES, _STATE, *_BOTH) or (kind and kind[0] in _NEITHER):
        return
    where = f"{where} ({kind[0] if kind else held})"
    if hasattr(cache_layer, "update_recurrent_state"):
        _refuse_state(where)
    if isinstance(cache_layer, CacheLayerMixin):
        _refuse_index(where)
    raise PruningNotSupported(
        f"{where} keeps no keys of its own: it has no attention, or reads the keys of an earlier layer, which are of "
        f"other tokens once some are dropped: {_REMEDY}."
    )


def _refuse_state(where: str) -> None:
    raise PruningNotSupported(
        f"{where} keeps a state of all tokens that it has seen instead of keys of each, which pruning does not serve: "
        f"{_REMEDY}."
    )


def _refuse_index(where: str) -> None:
    raise PruningNotSupported(
        f"{where} chooses or compresses the keys that it reads by an index over all tokens, which knows nothing of the "
        f"kept ones: {_REMEDY}."
    )


def refuse_encoder(model: nn.Module, layer: nn.Module) -> None:
    """Raise `PruningNotSupported` where tokens see later ones: an encoder recomputes its text for each new token."""
    looks_ahead = getattr(layer, "is_decoder", None) is False or any(
        getattr(module, "is_causal", None) is False for module in layer.modules()
    )
    if looks_ahead and getattr(model.config, "is_decoder", None) is False:
        raise PruningNotSupported(
            f"{type(model).__name__} is built as an encoder (is_decoder=False), whose tokens see later ones and which "
            "keeps no cache: load a model that was trained as a decoder, with is_decoder=True in its configuration."
        )


def refuse_own_windows(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Raise `PruningNotSupported` where a layer holds a table of who sees whom that is more than causal (GPT-Neo's).

    It is read by places among the keys that the layer is given: of kept tokens a window would reach too far back.
    """
    for index, layer in enumerate(layers):
        for name, table in layer.named_buffers():
            if table.dtype not in (torch.bool, torch.uint8) or table.device.type == "meta" or table.dim() < 2:
                continue
            square = table.shape[-1] == table.shape[-2] > 1
            if square and not bool(table[..., -1, :].all()):  # the last token does not see all tokens
                raise PruningNotSupported(
                    f"{type(model).__name__}: decoder layer {index} ({type(layer).__name__}) holds a window of its own "
                    f"({name}), which counts kept tokens instead of positions: use a model whose windows transformers "
                    "puts into its masks."
                )
