"""Inside one attention layer: a bias on its keys, and the attention that the last tokens pay.

Part of the door to transformers' internals (`architectures`). A name of our own enters transformers' attention
registries on entry and leaves on exit; the functions of transformers stay as they are. Axes: B batch, T tokens,
H heads, G key/value heads, w queries, D hidden size.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sdtp_lib.architectures import Architecture, attention_module, describe, layer_signature, named_arguments
from sdtp_lib.errors import PruningNotSupported

# Families whose attention is exactly: input_layernorm, q_proj / k_proj, perhaps a norm a head, rotary.
_SPLIT_PROJECTIONS = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
LOWEST_KEEP = 1e-6  # log(keep) below this adds nothing to the mask and its gradient explodes


class _Captured(Exception):
    def __init__(self, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        super().__init__()
        self.query, self.key, self.scaling = query, key, scaling


@contextlib.contextmanager
def _own_attention(config: Any, name: str, function: Callable, mask_like: str) -> Iterator[None]:
    """Let the layers that read ``config`` use ``function`` for attention; masks are made as for ``mask_like``."""
    before = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(name, function)
    # Without an entry here (in the class-wide table: only that one is looked at) transformers would hand out no mask at
    # all, and padded batches would be silently wrong.
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[mask_like])
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
        for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            registry._global_mapping.pop(name, None)


# --- a bias on the keys


@contextlib.contextmanager
def key_bias(model: nn.Module, bias_of: Callable[[int, torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
    """Add a bias to the attention scores of each key, layer by layer, without a T x T matrix.

    Queries get one more dimension (the constant 1 / scale), keys too (the bias), values a zero column, so that
    ``q'.k' * scale = q.k * scale + bias``; the gradient of that key dimension is the gradient of the bias.

    Parameters
    ----------
    bias_of
        Called as ``bias_of(layer_index, key)`` with ``key`` (B, G, T, head size); returns the bias (B, T) or
        (B, G, T) in the graph, or None for a layer without one.
    """
    architecture = describe(model)
    if architecture.model_type == "bloom":
        with _alibi_bias(architecture, bias_of):
            yield
        return
    if getattr(architecture.config, "attn_logit_softcapping", None):
        raise PruningNotSupported(
            f"{architecture.model_type}: attention scores are soft-capped, so a bias cannot enter through the keys: "
            "use label='gradient_x_hidden', which needs none."
        )
    inner = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def biased(module: nn.Module, query, key, value, attention_mask, scaling=None, **kwargs):
        bias = bias_of(module.layer_idx, key)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if bias is None:
            return inner(module, query, key, value, attention_mask, scaling=scale, **kwargs)
        bias = bias[:, None] if bias.dim() == 2 else bias
        bias = bias.to(key.dtype).expand(*key.shape[:-1])[..., None]
        query = torch.cat([query, query.new_full((*query.shape[:-1], 1), 1 / scale)], dim=-1)
        key = torch.cat([key, bias], dim=-1)
        # With unequal head sizes sdpa falls back to its T x T kernel.
        value = torch.cat([value, value.new_zeros(*value.shape[:-1], 1)], dim=-1)
        output, weights = inner(module, query, key, value, attention_mask, scaling=scale, **kwargs)
        return output[..., :-1], weights

    with _own_attention(architecture.config, f"sdtp_key_bias_{id(biased):x}", biased, "sdpa"):
        yield


@contextlib.contextmanager
def _alibi_bias(architecture: Architecture, bias_of: Callable) -> Iterator[None]:
    """BLOOM: the bias joins alibi, which is already added to the scores of each key."""
    heads = architecture.config.n_head

    def hook(index: int, names: tuple[str, ...]):
        def add(_module: nn.Module, args: tuple, kwargs: dict[str, Any]):
            arguments = named_arguments(names, args, kwargs)
            hidden, alibi = arguments.pop("hidden_states"), arguments["alibi"]
            rows = hidden.shape[0]
            bias = bias_of(index, hidden.new_empty(rows, heads, alibi.shape[-1], 0))
            if bias is None:
                return None
            bias = (bias[:, None] if bias.dim() == 2 else bias).expand(rows, heads, -1)
            arguments["alibi"] = alibi + bias.reshape(rows * heads, 1, -1).to(alibi.dtype)
            return (hidden,), arguments

        return add

    handles = [
        layer.register_forward_pre_hook(hook(index, layer_signature(layer)), with_kwargs=True)
        for index, layer in enumerate(architecture.layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def attention_bias(
    model: nn.Module, layers: Iterable[int] | None = None, per_kv_head: bool = False
) -> Iterator[dict[int, torch.Tensor]]:
    """Zero biases on the keys of ``layers`` (default all) as leaves whose ``.grad`` is dL/db after a backward pass.

    Yields a dictionary filled by the forward: layer -> Tensor (B, T), or (B, G, T) with ``per_kv_head``. |dL/db_l[j]|
    summed over the layers from a stage on is the first-order effect of removing token j there (removal saliency).
    """
    wanted = None if layers is None else set(layers)
    leaves: dict[int, torch.Tensor] = {}

    def bias_of(index: int, key: torch.Tensor) -> torch.Tensor | None:
        if wanted is not None and index not in wanted:
            return None
        shape = key.shape[:3] if per_kv_head else (key.shape[0], key.shape[2])
        leaves[index] = torch.zeros(shape, dtype=key.dtype, device=key.device, requires_grad=True)
        return leaves[index]

    with key_bias(model, bias_of):
        yield leaves


@contextlib.contextmanager
def attention_mask_out(model: nn.Module, keep: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """Simulate pruning by attention masking: from layer l on, keys with ``keep[l]`` = 0 are not seen.

    Parameters
    ----------
    keep
        Stage layer -> Tensor (B, T) in [0, 1], differentiable. The bias at a layer is the sum of ``log keep`` over the
        stages up to it; values below `LOWEST_KEEP` count as `LOWEST_KEEP`, whose gradient is zero.
    """
    stages = sorted(keep)
    total: dict[int, torch.Tensor] = {}
    running = None
    for layer in stages:
        logs = keep[layer].clamp_min(LOWEST_KEEP).log()
        running = logs if running is None else running + logs
        total[layer] = running

    def bias_of(index: int, key: torch.Tensor) -> torch.Tensor | None:
        due = [layer for layer in stages if layer <= index]
        return total[due[-1]].to(key.device) if due else None

    with key_bias(model, bias_of):
        yield


# --- attention of the last tokens


def attention_from_last(
    layer: nn.Module,
    hidden_states: torch.Tensor,
    position_embeddings: Any,
    window: int,
    valid: torch.Tensor | None = None,
    alibi: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention that the last ``window`` tokens pay at ``layer``, computed from the hidden states that enter it.

    Parameters
    ----------
    hidden_states : Tensor (B, T, D)
    position_embeddings : the (cos, sin) handed to the layer, or None
    valid : Tensor (B, T) of bool, optional
        Real tokens; padding is on the left.
    alibi : Tensor (B * H, 1, T), optional
        BLOOM's bias.

    Returns
    -------
    Tensor (B, H, w, T) of probabilities in float32 (float64 models: float64), w = min(window, T); no T x T tensor.
    """
    window = min(window, hidden_states.shape[1])
    query, key, scale = _queries_and_keys(layer, hidden_states, position_embeddings, window)
    return _probabilities(layer, query, key, scale, valid, alibi)


def attention_from_cached_keys(
    layer: nn.Module, last_hidden: torch.Tensor, keys: torch.Tensor, position_embeddings: Any, valid: torch.Tensor
) -> torch.Tensor | None:
    """The same (B, H, w, N) where ``layer`` has run and its ``keys`` (B, G, N, d) are at hand: no key is projected.

    ``last_hidden`` (B, w, D) are the last tokens as they entered the layer. None for families whose queries cannot be
    computed apart from the keys.
    """
    attention = attention_module(layer)
    if getattr(getattr(attention, "config", None), "model_type", None) not in _SPLIT_PROJECTIONS:
        return None
    query = _rotated(attention, layer.input_layernorm(last_hidden), "q", position_embeddings)
    return _probabilities(layer, query, keys, float(attention.scaling), valid, None)


def _probabilities(
    layer: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    valid: torch.Tensor | None,
    alibi: torch.Tensor | None,
) -> torch.Tensor:
    """Causal softmax (B, H, w, N) of the last w queries over all keys."""
    window, tokens = query.shape[2], key.shape[2]
    rows, heads, _, size = query.shape
    groups = key.shape[1]
    query = query.reshape(rows, groups, heads // groups, window, size)
    logits = torch.einsum("bgrwd,bgnd->bgrwn", query, key).reshape(rows, heads, window, -1) * scale
    cap = getattr(attention_module(layer), "attn_logit_softcapping", None)
    if cap:
        logits = torch.tanh(logits / cap) * cap
    if alibi is not None:
        logits = logits + alibi.reshape(rows, heads, 1, -1)
    columns = torch.arange(tokens, device=logits.device)
    seen = columns[None, :] <= columns[tokens - window :, None]
    seen = seen[None, None] if valid is None else seen[None, None] & valid[:, None, None, :].to(logits.device)
    logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)


def _queries_and_keys(
    layer: nn.Module, hidden_states: torch.Tensor, position_embeddings: Any, window: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Rotated queries (B, H, w, d) of the last tokens, rotated keys (B, G, T, d), and the score's scale."""
    attention = attention_module(layer)
    if hasattr(attention, "inv_norm_factor"):  # BLOOM: fused projection, no rotary, no attention interface
        query, key, _ = attention._reshape(attention.query_key_value(layer.input_layernorm(hidden_states)))
        return query[:, :, -window:], key, float(attention.inv_norm_factor)
    if attention.config.model_type in _SPLIT_PROJECTIONS:
        return _split_projections(layer, attention, hidden_states, position_embeddings, window)
    try:
        with _own_attention(attention.config, "sdtp_capture", _capture, "eager"):
            # The layer's own forward up to its attention call: norms, projections and rotary of any family.
            layer.forward(hidden_states, **_capture_arguments(layer, position_embeddings))
    except _Captured as captured:
        return captured.query[:, :, -window:], captured.key, captured.scaling
    raise PruningNotSupported(
        f"{type(layer).__name__} does not call transformers' attention interface, so its attention cannot be read: "
        "use another scorer."
    )


def _split_projections(
    layer: nn.Module, attention: nn.Module, hidden_states: torch.Tensor, tables: Any, window: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The same for families with q_proj and k_proj of their own: queries of the last tokens only, and no values."""
    normed = layer.input_layernorm(hidden_states)
    query = _rotated(attention, normed[:, -window:], "q", tables)
    return query, _rotated(attention, normed, "k", tables), float(attention.scaling)


def _rotated(attention: nn.Module, normed: torch.Tensor, which: str, tables: Any) -> torch.Tensor:
    """Queries (``which="q"``) or keys (``"k"``) (B, heads, n, d) of the last n tokens, normed and rotated."""
    found = getattr(attention, f"{which}_proj")(normed).unflatten(-1, (-1, attention.head_dim))
    if hasattr(attention, f"{which}_norm"):
        found = getattr(attention, f"{which}_norm")(found)
    found = found.transpose(1, 2)
    if getattr(attention, "use_rope", True):
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        cos, sin = (table[:, -normed.shape[1] :] for table in tables)
        found = rotate(found, found, cos, sin)[0]
    return found


def _capture(_module: nn.Module, query, key, _value, _mask, scaling=None, **_kwargs):
    raise _Captured(query, key, query.shape[-1] ** -0.5 if scaling is None else float(scaling))


def _capture_arguments(layer: nn.Module, position_embeddings: Any) -> dict[str, Any]:
    names = layer_signature(layer)
    arguments: dict[str, Any] = {"attention_mask": None}
    if "position_embeddings" in names:
        arguments["position_embeddings"] = position_embeddings
    return arguments
