"""The door to transformers' internals: where the decoder layers are, and what they are called with.

With its neighbours in this folder this is the only place that knows how a family of models is built. Nothing here
prunes. Families that follow the common decoder-layer signature (Llama, Mistral, Qwen2/3,
Phi-3, OLMo 2, SmolLM3, Gemma 2/3, GPT-NeoX, GPT-2, ...) share one path; BLOOM's alibi is the one special case. Axes:
B batch, T tokens, D hidden size.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sdtp_lib.architectures.unsupported import (
    mixed_layers,
    refuse_encoder,
    refuse_kind,
    refuse_object,
    refuse_own_windows,
    state_layers,
)
from sdtp_lib.config import PruningNotSupported

ATTENTION_BACKENDS = ("sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3")
# What remote code without annotations may call its cache.
_CACHE_NAMES = ("cache", "past_key_values", "layer_past", "past_key_value")
_ATTENTION_NAMES = ("self_attn", "attention", "self_attention", "attn")
# Their stacks end in ``hidden_states.view(-1, prompt length, D)``.
_RESHAPE_OUTPUT = ("gpt2", "gpt_neo", "gptj", "gpt_bigcode", "codegen")
# Values of ``layer_types`` whose layers see the tokens near a query only.
_WINDOWED = ("sliding_attention", "chunked_attention", "hybrid_sliding")
# A mask (B, T) beside that of attention, for what keeps a state in the same layer.
STATE_MASKS = ("mamba_attention_mask", "conv_mask")
# What multimodal configurations call the ids that stand for something else than text.
_PLACEHOLDERS = tuple(
    f"{kind}_token_{word}" for kind in ("image", "video", "audio", "img_context", "video_context", "sound_context")
    for word in ("id", "index")
)  # fmt: skip
# Arguments of decoder layers that `pruning.continuation` shortens, or that may stay as they are.
_KNOWN_ARGUMENTS = {
    "hidden_states", "attention_mask", "position_ids", "position_embeddings", "alibi", "use_cache", "output_attentions",
    "cache_position", "head_mask", "encoder_hidden_states", "encoder_attention_mask", "layer_idx",
    "per_layer_input", "shared_kv_states", *STATE_MASKS,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """Where a model keeps what the engine needs.

    Whoever calls several functions of this folder on one model makes it once and hands it to them in place of the
    model: to find it, every layer's signature is read.

    Attributes
    ----------
    model
        The causal LM itself, PEFT's wrapper included.
    stack
        The module that owns the decoder layers and whose forward is called once a pass.
    layers
        The decoder layers, in order.
    config
        The text configuration that the layers read.
    """

    model: nn.Module
    stack: nn.Module
    layers: nn.ModuleList
    config: Any

    @property
    def model_type(self) -> str:
        return str(self.config.model_type)

    @property
    def backend(self) -> str:
        """The attention backend in force now, such as ``"sdpa"``."""
        return str(getattr(self.config, "_attn_implementation", None) or "eager")

    @property
    def counts_windows_itself(self) -> bool:
        """Whether the kernel counts a sliding window in the keys it is given, instead of reading a mask."""
        return self.backend.startswith("flash_attention")

    @functools.cached_property
    def state_layers(self) -> frozenset[int]:
        """Layers that keep no keys and values of each token: a state of all that they were given, or nothing."""
        return state_layers(self.config)

    @functools.cached_property
    def with_state(self) -> frozenset[int]:
        """Those, and layers that keep a state beside keys and values."""
        return self.state_layers | mixed_layers(self.config)

    @property
    def is_multimodal(self) -> bool:
        """Whether the layers are those of a language model inside one that takes images, sound or the like."""
        return self.model.config is not self.config

    @functools.cached_property
    def placeholders(self) -> tuple[int, ...]:
        """Token ids that stand for images, sound and the like."""
        found = {getattr(self.model.config, name, None) for name in _PLACEHOLDERS} if self.is_multimodal else set()
        return tuple(sorted(each for each in found if isinstance(each, int)))

    def sliding_window(self, layer_index: int) -> int | None:
        """Tokens that layer ``layer_index`` sees at most (its own included), or None for full attention."""
        window = getattr(self.config, "sliding_window", None)
        layer_types = getattr(self.config, "layer_types", None)
        if layer_types is not None and layer_types[layer_index] == "chunked_attention":
            return getattr(self.config, "attention_chunk_size", None)
        if window is None or (layer_types is not None and layer_types[layer_index] not in _WINDOWED):
            return None
        return int(window)

    def windowed_layers(self) -> frozenset[int]:
        """Layers that see only tokens near the query, in families where other layers see all; empty elsewhere.

        Gemma 3 has five with a window for each without. Where every layer has one, none sees more than another.
        """
        kinds = list(getattr(self.config, "layer_types", None) or ())
        if "full_attention" not in kinds:
            return frozenset()
        return frozenset(index for index, kind in enumerate(kinds) if kind in _WINDOWED)

    @property
    def counts_positions_up_to(self) -> int | None:
        """How long a prompt may be for layers that count positions in the keys they hold; None where none counts.

        Llama 4 scales the queries of some layers by the logarithm of how often a position holds ``floor_scale``.
        """
        return int(self.config.floor_scale) - 1 if getattr(self.config, "attn_temperature_tuning", False) else None

    def fixed_length_norm(self) -> nn.Module | None:
        """The final norm where the stack reshapes its output to the prompt's length (GPT-2 and its kin), else None."""
        return getattr(self.stack, "ln_f", None) if self.model_type in _RESHAPE_OUTPUT else None

    def rotary(self) -> nn.Module | None:
        """The one rotary module of the stack, or None where positions enter otherwise or by layer type."""
        rotary = getattr(self.stack, "rotary_emb", None)
        if rotary is None or "layer_type" in inspect.signature(type(rotary).forward).parameters:
            return None
        return rotary


def position_argument(model: nn.Module, positions: torch.Tensor) -> dict[str, torch.Tensor]:
    """``{"position_ids": positions}`` for a call of ``model``; nothing where it takes none (BLOOM counts the mask)."""
    return {"position_ids": positions} if "position_ids" in inspect.signature(type(model).forward).parameters else {}


def pad_left(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) ids, 0 at padding, and attention mask of rows of unequal length, padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def describe(model: nn.Module | Architecture) -> Architecture:
    """The `Architecture` of a causal LM of transformers, also when wrapped by PEFT; one that was made already as it is.

    Raises
    ------
    PruningNotSupported
        For what is no model or a kind that cannot be served (`unsupported`), and for decoder layers that
        cannot be found or take an argument that is not known here and so cannot be shortened; the message names it.
    """
    if isinstance(model, Architecture):
        return model
    refuse_object(model)
    refuse_kind(model)
    name, config = type(model).__name__, model.config.get_text_config()
    inner = model if config is model.config else model.get_decoder()  # a multimodal model's language model
    if not isinstance(inner, nn.Module) or (inner is model and config is not model.config):
        raise PruningNotSupported(
            f"{name} is a multimodal model without a language model of its own (get_decoder): give a language model."
        )
    stack, layers = _find_stack(inner, config)
    refuse_encoder(model, layers[0])
    refuse_own_windows(model, layers)
    architecture = Architecture(model, stack, layers, config)
    for index, layer in enumerate(layers):
        missing = missing_from_signature(layer)
        if missing:
            raise PruningNotSupported(
                f"{name}: decoder layer {index} ({type(layer).__name__}) {missing}, so its inputs cannot be shortened: "
                "see CONTRIBUTING.md, 'Adding a family'."
            )
    return architecture


def _find_stack(model: nn.Module, config: Any) -> tuple[nn.Module, nn.ModuleList]:
    # BART's kin count encoder layers as num_hidden_layers, also where the model is their decoder alone.
    counts = {getattr(config, name, None) for name in ("num_hidden_layers", "decoder_layers")} - {None}
    for path, owner in model.named_modules():
        for child in owner.children():
            if isinstance(child, nn.ModuleList) and len(child) in counts and any(map(attention_of, child)):
                return _takes_tokens(model, path), child
    raise PruningNotSupported(
        f"{type(model).__name__}: no list of {' or '.join(map(str, counts)) or 'so many'} decoder layers was found, "
        f"each with an attention module ({', '.join(_ATTENTION_NAMES)}): see CONTRIBUTING.md, 'Adding a family'."
    )


def _takes_tokens(model: nn.Module, path: str) -> nn.Module:
    """The innermost module around the layers that gets tokens: BERT's own layers sit in one that gets hidden states."""
    inner = module = model.get_submodule(path)
    while path and "input_ids" not in inspect.signature(type(module).forward).parameters:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
    return module if "input_ids" in inspect.signature(type(module).forward).parameters else inner


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The self-attention of a decoder layer, None where it has none by a known name."""
    found = next((module for name in _ATTENTION_NAMES if (module := getattr(layer, name, None)) is not None), None)
    mixer = getattr(layer, "mixer", None)  # Nemotron H: attention in some layers
    return mixer if found is None and "Attention" in type(mixer).__name__ else found


def attention_module(layer: nn.Module) -> nn.Module:
    """The self-attention of a decoder layer, which must have one."""
    attention = attention_of(layer)
    if attention is None:
        names = ", ".join(_ATTENTION_NAMES)
        raise PruningNotSupported(
            f"{type(layer).__name__} has no attention module named {names}, so its attention cannot be read: prune "
            "before layers that have one, or use a score that reads none, such as 'recency'."
        )
    return attention


def decoder_layers(model: nn.Module | Architecture) -> nn.ModuleList:
    """The decoder layers of ``model``, in order."""
    return describe(model).layers


def num_layers(model: nn.Module) -> int:
    """L, the number of decoder layers."""
    return len(decoder_layers(model))


# --- what a decoder layer is called with


def layer_signature(layer: nn.Module) -> tuple[str, ...]:
    """Argument names of the layer's forward, without ``self`` and ``**kwargs``."""
    # The class's own forward: accelerate replaces the instance's by a wrapper without names.
    return _signature_of(type(layer))[0]


@functools.cache
def _signature_of(kind: type) -> tuple[tuple[str, ...], frozenset[str]]:
    """Argument names of a layer class's forward, and which of them are a cache; read once, for layers by the dozen.

    A cache is annotated as one, or has a name that was always one's.
    """
    parameters = list(inspect.signature(kind.forward).parameters.values())
    named = tuple(p.name for p in parameters[1:] if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
    return named, frozenset(p.name for p in parameters if "Cache" in str(p.annotation) or p.name in _CACHE_NAMES)


def missing_from_signature(layer: nn.Module) -> str:
    """What keeps a layer from being served by the common path, in words; empty if nothing does."""
    names = layer_signature(layer)
    if not names or names[0] != "hidden_states":
        return f"takes {names[0] if names else 'nothing'!r} first instead of 'hidden_states'"
    if "attention_mask" not in names:
        return "takes no 'attention_mask'"
    if hasattr(layer, "altup"):
        return "carries several streams of hidden states at once (altup)"
    caches = _signature_of(type(layer))[1]
    if not caches:
        return "takes no cache (an argument annotated as one, or called past_key_values)"
    unknown = [name for name in names if name not in _KNOWN_ARGUMENTS and name not in caches]
    return f"takes the unknown argument(s) {', '.join(unknown)}" if unknown else ""


def named_arguments(names: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Positional and keyword arguments of one layer call, by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


# --- hooks


@contextlib.contextmanager
def before_layers(
    model: nn.Module | Architecture, layers: Iterable[int], hook_of: Callable[[int, nn.Module], Callable[..., Any]]
) -> Iterator[None]:
    """Inside the ``with``, ``hook_of(index, layer)`` is called as ``(layer, args, kwargs)`` before each of ``layers``.

    What it returns, if anything, stands in for the layer's arguments (torch's forward pre-hook).
    """
    decoder = decoder_layers(model)
    with contextlib.ExitStack() as cleanup:
        for index in layers:
            handle = decoder[index].register_forward_pre_hook(hook_of(index, decoder[index]), with_kwargs=True)
            cleanup.callback(handle.remove)
        yield


@contextlib.contextmanager
def layer_inputs(model: nn.Module | Architecture, layers: Iterable[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Record the hidden state (B, T, D) that enters each of ``layers`` in every forward inside the ``with``."""
    seen: dict[int, torch.Tensor] = {}

    def recorder(index: int, _layer: nn.Module):
        def record(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            seen[index] = args[0] if args else kwargs["hidden_states"]

        return record

    with before_layers(model, layers, recorder):
        yield seen
