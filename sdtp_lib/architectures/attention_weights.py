"""Attention weights of the last tokens: in a layer that is about to run, or in one that has run.

Part of the door to transformers' internals (`architectures`). The layer's own norms, projections and mask are used, and
the arguments that it is called with: windows, packed sequences, dynamic masks, sinks, soft caps need not be known here.
No T x T tensor is made. Axes: B batch, T or N tokens, H heads, G key/value
heads, w queries, D hidden size, d head size.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sdtp_lib.architectures.attention_interface import own_attention
from sdtp_lib.architectures.layers import attention_module, attention_of
from sdtp_lib.architectures.row_masks import RowMask
from sdtp_lib.config import PruningNotSupported

# Families whose attention is exactly: input_layernorm, q_proj / k_proj, perhaps a norm per head, rotary, plain softmax.
_SPLIT_PROJECTIONS = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


class _Captured(Exception):
    """What a layer hands to its attention function."""

    def __init__(self, module: nn.Module, query, key, value, mask: Any, options: dict[str, Any]) -> None:
        super().__init__()
        self.module, self.query, self.key, self.value = module, query, key, value
        self.mask, self.options = mask, options


def attention_from_last(
    layer: nn.Module,
    hidden_states: torch.Tensor,
    arguments: Mapping[str, Any],
    window: int,
    valid: torch.Tensor | None = None,
    past: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Attention that the last ``window`` tokens pay at ``layer``, computed from the hidden states that enter it.

    Parameters
    ----------
    hidden_states : Tensor (B, N, D)
    arguments
        What the layer would be called with for these tokens, by name, without a cache. Without an ``attention_mask``
        every token sees itself and the earlier ones.
    valid : Tensor (B, N) of bool, optional
        Real tokens, where no mask tells padding; padding is on the left.
    past : (Tensor, Tensor), optional
        Keys and values (B, G, S, d) of a cached prefix, to which the tokens attend as well; the mask covers S + N keys.

    Returns
    -------
    Tensor (B, H, w, N) in float32 (float64 models: float64), w = min(window, N). Rows add up to 1, or to less where the
    layer has attention sinks, and where some is paid to the prefix.

    Raises
    ------
    PruningNotSupported
        For layers that do not call transformers' attention interface.
    """
    tokens = hidden_states.shape[1]
    window = min(window, tokens)
    attention = attention_module(layer)
    split = _is_split(attention)
    if split or hasattr(attention, "_reshape") and "alibi" in arguments:
        normed = layer.input_layernorm(hidden_states)
        if split:  # queries of the last tokens only, and no values
            tables = arguments.get("position_embeddings")
            (query,) = _rotated([attention], [attention.q_proj(normed[:, -window:])], "q", tables)
            (key,) = _rotated([attention], [attention.k_proj(normed)], "k", tables)
            scale = float(attention.scaling)
        else:  # BLOOM: fused projection, alibi, no attention interface
            query, key, _ = attention._reshape(attention.query_key_value(normed))
            query, scale = query[:, :, -window:], float(attention.inv_norm_factor)
        key = _after(past, 0, key)
        rows = mask_rows(arguments.get("attention_mask"), window, key.shape[2])
        rows = _visible(attention, rows, window, key, valid)
        if not split:
            rows = rows + arguments["alibi"].reshape(len(query), -1, 1, key.shape[2])
        return _plain_weights(query, key, scale, rows)[..., -tokens:]
    captured = _capture(layer, hidden_states, arguments)
    key, value = _after(past, 0, captured.key), _after(past, 1, captured.value)
    rows = mask_rows(captured.mask, window, key.shape[2])
    rows = _visible(captured.module, rows, window, key, valid)
    weigh = getattr(sys.modules[type(captured.module).__module__], "eager_attention_forward", None)
    if weigh is None:
        raise _unreadable(layer, "its module has no attention function that shows weights")
    query = captured.query[:, :, -window:]
    try:
        weights = weigh(captured.module, query, key, value, rows, **captured.options)[1]
    except Exception as error:  # a function of the family's own, fed with fewer queries than it may expect
        raise _unreadable(layer, f"{type(error).__name__}: {error}") from error
    return weights[..., -tokens:].to(torch.promote_types(weights.dtype, torch.float32))


def _after(past: tuple[torch.Tensor, torch.Tensor] | None, which: int, new: torch.Tensor) -> torch.Tensor:
    """Keys (``which=0``) or values (1) of a cached prefix and the new ones behind them."""
    return new if past is None else torch.cat([past[which].to(new.device), new], dim=2)


def attention_from_cached_keys(
    layers: Sequence[nn.Module],
    queries: Sequence[torch.Tensor],
    keys: Sequence[torch.Tensor],
    position_embeddings: Any,
    rows: Sequence[torch.Tensor | None],
    valid: torch.Tensor | None,
) -> list[torch.Tensor]:
    """The same (B, H, w, n) for each of ``layers``, which have run on the same tokens: nothing is projected.

    ``queries`` (B, w, H * d) are what a layer's `query_projection` gave for the last tokens, ``keys`` (B, G, n, d) are
    cached there, ``rows`` (B, 1, w, n) are those of the mask that the last tokens had there.
    """
    attentions = [attention_module(layer) for layer in layers]
    asked = _rotated(attentions, queries, "q", position_embeddings)
    scales = [float(attention.scaling) for attention in attentions]
    causal = all(getattr(attention, "is_causal", True) for attention in attentions)
    if causal and valid is None and not any(mask is not None for mask in rows) and len({k.shape for k in keys}) == 1:
        return _causal_weights(asked, keys, scales)
    window = queries[0].shape[1]
    return [
        _plain_weights(query, key, scale, _visible(attention, mask, window, key, valid))
        for attention, query, key, scale, mask in zip(attentions, asked, keys, scales, rows, strict=True)
    ]


# --- masks


def mask_rows(mask: Any, window: int, tokens: int) -> torch.Tensor | None:
    """Rows (B, 1 or H, w, N) of the last ``window`` queries of a mask in any backend's form; None where it is None."""
    if mask is None:
        return None
    if isinstance(mask, RowMask):
        return mask.written_out(window, tokens)
    if torch.is_tensor(mask) and mask.dim() == 4:
        return mask[:, :, -window:, -tokens:]
    if torch.is_tensor(mask) and mask.dim() == 2:  # flash attention: padding only, causal by itself
        later = torch.ones(window, tokens, dtype=torch.bool, device=mask.device).triu(1 + tokens - window)
        return mask[:, None, None, -tokens:].bool() & ~later
    if hasattr(mask, "mask_mod"):  # flex attention
        rows, heads = mask.kv_num_blocks.shape[:2]
        axes = [torch.arange(size, device=mask.kv_num_blocks.device) for size in (rows, heads, tokens, tokens)]
        batch, head, query, key = torch.meshgrid(*axes[:2], axes[2][-window:], axes[3], indexing="ij")
        return mask.mask_mod(batch, head, query, key).expand(batch.shape)
    shape = tuple(mask.shape) if torch.is_tensor(mask) else type(mask).__name__
    raise PruningNotSupported(f"an attention_mask of shape {shape} cannot be read: use another scorer.")


def _visible(
    attention: nn.Module, rows: torch.Tensor | None, window: int, like: torch.Tensor, valid: torch.Tensor | None
) -> torch.Tensor:
    """What is added to the scores of the last ``window`` queries: ``rows``, or causality where there is no mask."""
    if rows is not None and rows.dtype.is_floating_point:
        return rows
    tokens = like.shape[-2]
    lowest = torch.finfo(like.dtype).min
    if rows is None:
        # The last 2 queries of 5 tokens: query 3 sees keys 0 to 3, query 4 sees all five.
        rows = torch.ones(1, 1, window, tokens, dtype=torch.bool, device=like.device)
        if getattr(attention, "is_causal", True):
            rows = rows.tril(tokens - window)
        if valid is not None:
            valid = torch.nn.functional.pad(valid, (tokens - valid.shape[1], 0), value=True)
            rows = rows & valid[:, None, None, :].to(rows.device)
    return torch.zeros_like(rows, dtype=like.dtype).masked_fill_(~rows, lowest)


# --- queries and keys


def query_projection(layer: nn.Module) -> nn.Module | None:
    """The module whose output (B, N, H * d) are a layer's queries, before norm and rotation; None for a fused one."""
    attention = attention_of(layer)
    return attention.q_proj if _is_split(attention) else None


def projected_queries(layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor | None:
    """Queries (B, w, H * d) of ``hidden_states`` (B, w, D) as they enter ``layer``; None as `query_projection`."""
    project = query_projection(layer)
    return None if project is None else project(layer.input_layernorm(hidden_states))


def _is_split(attention: nn.Module | None) -> bool:
    return getattr(getattr(attention, "config", None), "model_type", None) in _SPLIT_PROJECTIONS


def _plain_weights(query: torch.Tensor, key: torch.Tensor, scale: float, added: torch.Tensor) -> torch.Tensor:
    """Softmax (B, H, w, N) over all keys."""
    logits = _products(query, key, scale) + added
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)


def _causal_weights(
    queries: Sequence[torch.Tensor], keys: Sequence[torch.Tensor], scales: Sequence[float]
) -> list[torch.Tensor]:
    """`_plain_weights` of several layers' last tokens without padding: of their keys only the last may be hidden."""
    logits = torch.cat(list(map(_products, queries, keys, scales)), dim=1)
    window = logits.shape[2]
    later = torch.ones(window, window, dtype=torch.bool, device=logits.device).triu(1)
    logits[..., -window:].masked_fill_(later, torch.finfo(logits.dtype).min)
    paid = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
    return list(paid.split([query.shape[1] for query in queries], dim=1))


def _products(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Scaled products (B, H, w, N), without repeating keys for the heads that share them."""
    # The H / G heads that share a key head become more queries of it: (B, G, H / G * w, d) against keys (B, G, N, d).
    rows, heads, window, size = query.shape
    groups, tokens = key.shape[1:3]
    query = (query * scale).reshape(rows * groups, heads // groups * window, size)
    return torch.bmm(query, key.flatten(0, 1).transpose(1, 2)).view(rows, heads, window, tokens)


def _rotated(
    attentions: Sequence[nn.Module], projected: Sequence[torch.Tensor], which: str, tables: Any
) -> list[torch.Tensor]:
    """Queries (``which="q"``) or keys (``"k"``) (B, heads, n, d) of the last n tokens in each layer, normed, rotated.

    ``projected`` are (B, n, heads * d) each. They are rotated all at once: positions are the same in all layers.
    """
    found, turned = [], []
    for attention, values in zip(attentions, projected, strict=True):
        values = values.unflatten(-1, (-1, attention.head_dim))
        if hasattr(attention, f"{which}_norm"):
            values = getattr(attention, f"{which}_norm")(values)
        found.append(values.transpose(1, 2))
        turned.append(getattr(attention, "use_rope", True))
    if any(turned):
        rotate = sys.modules[type(attentions[0]).__module__].apply_rotary_pos_emb
        cos, sin = (table[:, -found[0].shape[2] :] for table in tables)
        some = [values for values, turns in zip(found, turned, strict=True) if turns]
        together = rotate(torch.cat(some, dim=1), some[0][:, :1], cos, sin)[0]
        parts = iter(together.split([values.shape[1] for values in some], dim=1))
        found = [next(parts) if turns else values for values, turns in zip(found, turned, strict=True)]
    return found


def _capture(layer: nn.Module, hidden_states: torch.Tensor, arguments: Mapping[str, Any]) -> _Captured:
    """The layer's own forward up to its attention call: norms, projections, rotary and mask of any family."""

    def stop(module: nn.Module, query, key, value, attention_mask=None, **options):
        raise _Captured(module, query, key, value, attention_mask, {**options, "dropout": 0.0})

    # Where the attention lies within another module (BERT), that one need not have a configuration.
    configs = [module.config for module in attention_module(layer).modules() if hasattr(module, "config")]
    config = next((config for config in configs if hasattr(config, "_attn_implementation")), None)
    if config is None:
        raise _unreadable(layer, "it does not call transformers' attention interface")
    backend = config._attn_implementation
    try:
        # The layer runs as usual; `stop` stands where its attention function would be called, and ends it there.
        with own_attention(config, stop, backend if backend in ("eager", "sdpa") else "sdpa"):
            layer.forward(**{**arguments, "hidden_states": hidden_states})
    except _Captured as captured:
        # Its traceback's frames hold it and the layer's tensors: a circle, which only Python's collector would free.
        return captured.with_traceback(None)
    except Exception as error:
        raise _unreadable(layer, f"{type(error).__name__}: {error}") from error
    raise _unreadable(layer, "it does not call transformers' attention interface")


def _unreadable(layer: nn.Module, reason: str) -> PruningNotSupported:
    return PruningNotSupported(
        f"{type(layer).__name__}: its attention cannot be read ({reason}): use another scorer, or label='removal'."
    )
