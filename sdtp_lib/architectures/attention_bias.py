"""Inside attention: a bias on each key, added to the attention scores before the softmax.

Part of the door to transformers' internals (`architectures`). There are two ways to add a bias; which one a family
needs is not known beforehand: `bias_route` tries them on the model itself and takes the first that proves right.

- ``keys``: sdpa, with the bias as one more dimension of the keys. No T x T tensor.
- ``mask``: eager attention, with the bias added to the T x T mask that each layer adds to its scores. Serves families
  with attention sinks, a soft cap, or an attention function of their own.

Axes: B batch, T tokens, H heads, G key/value heads.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sdtp_lib.architectures.attention_interface import backend_named, own_attention
from sdtp_lib.architectures.bias_probe import first_that_proves_right
from sdtp_lib.architectures.layers import (
    Architecture,
    attention_module,
    before_layers,
    describe,
    layer_signature,
    named_arguments,
)
from sdtp_lib.config import PruningNotSupported

LOWEST_KEEP = 1e-6  # log(keep) below this adds nothing to the mask and its gradient explodes
BiasOf = Callable[[int, torch.Tensor], torch.Tensor | None]


# --- a bias on the keys


@contextlib.contextmanager
def key_bias(model: nn.Module | Architecture, bias_of: BiasOf) -> Iterator[None]:
    """Add a bias to the attention scores of each key, layer by layer; a bias of 0 leaves the logits as they are.

    Parameters
    ----------
    bias_of
        Called as ``bias_of(layer_index, key)`` with ``key`` (B, G, T, any), which tells shape, dtype and device;
        returns the bias (B, T) or (B, G, T) in the graph, or None for a layer without one.

    Raises
    ------
    PruningNotSupported
        Before any compute of the caller's, for models on which no way of adding a bias proves right (`bias_route`).
    """
    architecture = describe(model)
    with _ROUTES[bias_route(architecture)](architecture, bias_of):
        yield


@contextlib.contextmanager
def _through_keys(architecture: Architecture, bias_of: BiasOf) -> Iterator[None]:
    """Queries get one more dimension (the constant 1 / scale), keys too (the bias), values a zero column.

    So ``q'.k' * scale = q.k * scale + bias``, and the gradient of that key dimension is the gradient of the bias.
    """
    inner = ALL_ATTENTION_FUNCTIONS["sdpa"]
    running: dict[str, Any] = {}

    def enter(index: int, _layer: nn.Module):
        def note(*_: Any) -> None:
            running.clear()
            running["index"] = index

        return note

    def biased(module: nn.Module, query, key, value, attention_mask, scaling=None, **kwargs):
        if lost := [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]:
            raise PruningNotSupported(f"sdpa leaves out what this attention is given ({', '.join(lost)}).")
        if "bias" not in running:  # some layers call attention twice: with one and the same bias
            running["bias"] = bias_of(running["index"], key)
        bias = running["bias"]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if bias is None:
            return inner(module, query, key, value, attention_mask, scaling=scale, **kwargs)
        # query (B, H, T, d) -> (B, H, T, d + 1), key and value (B, G, T, d) -> (B, G, T, d + 1). The added product is
        # (1 / scale) * bias, which sdpa multiplies by scale: the score of key j gets bias[j], whoever asks.
        bias = bias[:, None] if bias.dim() == 2 else bias
        bias = bias.to(key.dtype).expand(*key.shape[:-1])[..., None]
        # On a GPU zeros fill it up to a multiple of 8: for other sizes, and for unequal ones, sdpa falls back to its
        # T x T kernel.
        own_size = value.shape[-1]
        spare = -(query.shape[-1] + 1) % 8 if query.is_cuda else 0
        constant = torch.nn.functional.pad(query.new_full((*query.shape[:-1], 1), 1 / scale), (0, spare))
        query = torch.cat([query, constant], dim=-1)
        key = torch.cat([key, torch.nn.functional.pad(bias, (0, spare))], dim=-1)
        value = torch.nn.functional.pad(value, (0, 1 + spare))
        output, weights = inner(module, query, key, value, attention_mask, scaling=scale, **kwargs)
        return output[..., :own_size].contiguous(), weights  # as the functions of transformers return it

    every = range(len(architecture.layers))
    with before_layers(architecture, every, enter), own_attention(architecture.config, biased, "sdpa"):
        yield


@contextlib.contextmanager
def _through_mask(architecture: Architecture, bias_of: BiasOf) -> Iterator[None]:
    """Eager attention always gets a mask to add to its scores, sinks and soft caps included: the bias joins it."""

    def hook(index: int, layer: nn.Module):
        names, (heads, groups) = layer_signature(layer), _head_counts(architecture.config, layer)

        def add(_module: nn.Module, args: tuple, kwargs: dict[str, Any]):
            arguments = named_arguments(names, args, kwargs)
            hidden, mask = arguments.pop("hidden_states"), arguments.get("attention_mask")
            if mask is not None and (not torch.is_tensor(mask) or mask.dim() != 4):
                shape = tuple(mask.shape) if torch.is_tensor(mask) else type(mask).__name__
                raise PruningNotSupported(f"layer {index} gets an attention_mask of shape {shape}, not (B, 1, T, T).")
            bias = bias_of(index, hidden.new_empty(hidden.shape[0], groups, hidden.shape[1], 0))
            if bias is None:
                return None
            bias = bias[:, None] if bias.dim() == 2 else bias.repeat_interleave(heads // groups, dim=1)
            bias = bias[:, :, None, :]  # (B, 1 or H, 1, T): the same for every query
            if mask is not None and mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill_(~mask, torch.finfo(hidden.dtype).min)
            arguments["attention_mask"] = bias if mask is None else mask + bias.to(mask.dtype)
            return (hidden,), arguments

        return add

    every = range(len(architecture.layers))
    with before_layers(architecture, every, hook), backend_named(architecture.config, "eager"):
        yield


def _head_counts(config: Any, layer: nn.Module) -> tuple[int, int]:
    """H and G of a layer, as far as its attention or the configuration tells; else G = H."""
    heads = int(config.num_attention_heads)
    repeated = getattr(attention_module(layer), "num_key_value_groups", None)
    groups = heads // int(repeated) if repeated else int(getattr(config, "num_key_value_heads", None) or heads)
    return heads, groups if heads % groups == 0 else heads


_ROUTES = {"keys": _through_keys, "mask": _through_mask}


# --- which way is right, tried on the model itself

_ROUTE_OF: weakref.WeakKeyDictionary[nn.Module, dict[tuple, str]] = weakref.WeakKeyDictionary()


def bias_route(model: nn.Module | Architecture) -> str:
    """``"keys"`` or ``"mask"``: the first way of adding a bias that proves right on a short prompt.

    Right is: a bias of 0 changes no logits and has a gradient in every layer; a key under a very low bias is gone (its
    token no longer matters to those after it); and where the weights are shown, a bias b multiplies a key's odds by
    exp(b). Tried once per model object, backend and dtype.

    Raises
    ------
    PruningNotSupported
        If neither does, naming what went wrong in each.
    """
    architecture = describe(model)
    known, model = _ROUTE_OF.setdefault(architecture.stack, {}), architecture.model
    key = (architecture.backend, model.dtype, architecture.stack.training)
    if key not in known:
        known[key] = first_that_proves_right(model, architecture, _ROUTES)
    return known[key]


# --- what biases are for


@contextlib.contextmanager
def attention_bias(
    model: nn.Module | Architecture,
    layers: Iterable[int] | None = None,
    per_kv_head: bool = False,
    keep: Mapping[int, torch.Tensor] | None = None,
) -> Iterator[dict[int, torch.Tensor]]:
    """Zero biases on the keys of ``layers`` (default all) as leaves whose ``.grad`` is dL/db after a backward pass.

    Yields a dictionary filled by the forward: layer -> Tensor (B, T), or (B, G, T) with ``per_kv_head``. |dL/db_l[j]|
    summed over the layers from a stage on is the first-order effect of removing token j there (removal saliency).
    With ``keep``, as in `attention_mask_out`, of a forward in which other tokens are gone already.
    """
    wanted = None if layers is None else set(layers)
    leaves: dict[int, torch.Tensor] = {}
    lowered = _log_keep(keep or {})

    def bias_of(index: int, key: torch.Tensor) -> torch.Tensor | None:
        less = lowered(index, key)
        if wanted is not None and index not in wanted:
            return less
        shape = key.shape[:3] if per_kv_head else (key.shape[0], key.shape[2])
        leaves[index] = torch.zeros(shape, dtype=key.dtype, device=key.device, requires_grad=True)
        if less is None:
            return leaves[index]
        return leaves[index] + (less[:, None] if per_kv_head else less).to(key.dtype)

    with key_bias(model, bias_of):
        yield leaves


@contextlib.contextmanager
def attention_mask_out(model: nn.Module | Architecture, keep: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """Simulate pruning by attention masking: from layer l on, keys with ``keep[l]`` = 0 are not seen.

    Parameters
    ----------
    keep
        Stage layer -> Tensor (B, T) in [0, 1], differentiable. The bias at a layer is the sum of ``log keep`` over the
        stages up to it; values below `LOWEST_KEEP` count as `LOWEST_KEEP`, whose gradient is zero.
    """
    with key_bias(model, _log_keep(keep)):
        yield


def _log_keep(keep: Mapping[int, torch.Tensor]) -> BiasOf:
    """The bias of `attention_mask_out` at a layer; None before the first stage."""
    stages = sorted(keep)
    total: dict[int, torch.Tensor] = {}
    running = None
    # Stages at 4 and 7: layers 4 to 6 get log keep[4], layers from 7 on log keep[4] + log keep[7].
    for layer in stages:
        logs = keep[layer].clamp_min(LOWEST_KEEP).log()
        running = logs if running is None else running + logs
        total[layer] = running

    def bias_of(index: int, key: torch.Tensor) -> torch.Tensor | None:
        due = [layer for layer in stages if layer <= index]
        return total[due[-1]].to(key.device) if due else None

    return bias_of
