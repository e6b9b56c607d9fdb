"""What the last tokens attend to: at a layer that is to come, at one that has run, and in a forward under way.

Part of the door to transformers' internals (`architectures`); no T x T tensor anywhere. Axes: B batch, T or N tokens,
H heads, G key/value heads, w queries, D hidden size, d head size.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sdtp_lib.architectures.attention_bias import own_attention
from sdtp_lib.architectures.layers import attention_module, describe, layer_signature, named_arguments
from sdtp_lib.config import PruningNotSupported

# Families whose attention is exactly: input_layernorm, q_proj / k_proj, perhaps a norm a head, rotary.
_SPLIT_PROJECTIONS = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


class _Captured(Exception):
    def __init__(self, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        super().__init__()
        self.query, self.key, self.scaling = query, key, scaling


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


@contextlib.contextmanager
def attention_looked_back_at(
    model: nn.Module, looked_back: Mapping[int, Sequence[int]], window: int, living: Callable[[int], torch.Tensor]
) -> Iterator[dict[int, torch.Tensor]]:
    """What `Stage.attention_mass` would show in a pruned prefill, out of one unpruned forward over prompt and response.

    Yields stage -> Tensor (B, T, H x layers), filled by the forward without a graph; 0 outside the prompt.

    Parameters
    ----------
    looked_back
        Stage -> the earlier layers whose attention it reads.
    window
        The prompt's last tokens that ask.
    living
        Layer -> the prompt's tokens that live there, (B, T) bool. Asked before the layer runs, and after what its own
        stage is shown has been filled in, except in families that show a stage its own layer.
    """
    architecture = describe(model)
    # As at a stage: families whose queries cannot be had apart show the stage's own layer in place of all others.
    apart = architecture.model_type in _SPLIT_PROJECTIONS
    sources = {stage: tuple(layers) if apart else (stage,) * len(layers) for stage, layers in looked_back.items()}
    paid: dict[int, torch.Tensor] = {}
    found: dict[int, torch.Tensor] = {}

    def hook(index: int, names: tuple[str, ...]):
        @torch.no_grad()
        def read(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            arguments = named_arguments(names, args, kwargs)
            paid[index] = _mass_in_prompts(module, arguments, window, living(index))
            for stage, layers in sources.items():
                if layers[-1] == index:
                    found[stage] = torch.cat([paid[layer].to(paid[index].device) for layer in layers], dim=-1)

        return read

    wanted = sorted({layer for layers in sources.values() for layer in layers})
    handles = [
        architecture.layers[index].register_forward_pre_hook(
            hook(index, layer_signature(architecture.layers[index])), with_kwargs=True
        )
        for index in wanted
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _mass_in_prompts(layer: nn.Module, arguments: Mapping[str, Any], window: int, living: torch.Tensor) -> torch.Tensor:
    """(B, T, H) attention that the last ``window`` living tokens of each row pay to its others; 0 where none live."""
    hidden, tables, alibi = arguments["hidden_states"], arguments.get("position_embeddings"), arguments.get("alibi")
    rows, tokens = hidden.shape[:2]
    mass = []
    for row, alive in enumerate(living.to(hidden.device)):
        own = None if tables is None else tuple(t[row if t.shape[0] > 1 else 0, alive][None] for t in tables)
        bias = None if alibi is None else alibi.reshape(rows, -1, 1, tokens)[row][..., alive]
        paid = attention_from_last(layer, hidden[row : row + 1, alive], own, window, None, bias)[0].sum(dim=1)
        mass.append(paid.new_zeros(tokens, len(paid)).index_put((alive.nonzero()[:, 0],), paid.transpose(0, 1)))
    return torch.stack(mass)


def attention_from_cached_keys(
    layer: nn.Module,
    last_hidden: torch.Tensor,
    keys: torch.Tensor,
    position_embeddings: Any,
    valid: torch.Tensor | None,
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
    query = (query * scale).reshape(rows, groups, heads // groups * window, size)
    logits = (query @ key.transpose(-1, -2)).reshape(rows, heads, window, tokens)
    cap = getattr(attention_module(layer), "attn_logit_softcapping", None)
    if cap:
        logits = torch.tanh(logits / cap) * cap
    if alibi is not None:
        logits = logits + alibi.reshape(rows, heads, 1, -1)
    # Only the askers themselves have tokens after them.
    lowest = torch.finfo(logits.dtype).min
    later = torch.ones(window, window, dtype=torch.bool, device=logits.device).triu(1)
    logits[..., tokens - window :].masked_fill_(later, lowest)
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None, :].to(logits.device), lowest)
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
        with own_attention(attention.config, "sdtp_capture", _capture, "eager"):
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
