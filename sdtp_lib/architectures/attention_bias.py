"""Inside one attention layer: a bias on its keys.

Part of the door to transformers' internals (`architectures`). A name of our own enters transformers' attention
registries on entry and leaves on exit; the functions of transformers stay as they are. Axes: B batch, T tokens,
H heads, G key/value heads, w queries, D hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sdtp_lib.architectures.layers import Architecture, describe, layer_signature, named_arguments
from sdtp_lib.config import PruningNotSupported

LOWEST_KEEP = 1e-6  # log(keep) below this adds nothing to the mask and its gradient explodes


@contextlib.contextmanager
def own_attention(config: Any, name: str, function: Callable, mask_like: str) -> Iterator[None]:
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

    with own_attention(architecture.config, f"sdtp_key_bias_{id(biased):x}", biased, "sdpa"):
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
