"""The slow reference that pruning is compared with: the whole prompt, no cache, dropped tokens masked in attention.

Shares no code with what it checks. It finds the decoder layers by a search of its own and takes whatever attention mask
transformers made for each layer; from a stage on it hides the keys of the dropped tokens in it, so windows, alibi and
anything else a family puts into its masks stay as they are. It knows models and kept positions, nothing else.
Axes: B rows (one here), T tokens of prompt and continuation, V vocabulary.

A layer that keeps a state of what it was given (linear attention, Mamba, a convolution) has no mask to hide a token in:
such a layer is run on the tokens that are not hidden, and on no others.

Worked example: T = 10 of which 8 are the prompt, ``kept = {4: [0, 1, 5, 6, 7]}``. Layers 0 to 3 see their own mask;
from layer 4 on nobody sees tokens 2, 3 and 4 any more (each of these still sees itself, so that no row of the mask is
empty); tokens 8 and 9 came later and are seen by all after them.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

# Masks of something other than self-attention over tokens.
_OTHER_MASKS = ("head", "encoder", "cross", "expert", "padding")

_TOWERS = ("vision", "visual", "image", "audio")
_WITH_STATE = ("linear_attention", "conv", "mamba", "mamba2", "recurrent")
_WITH_BOTH = ("hybrid", "hybrid_sliding")  # such layers also attend: of these the part that keeps a state is run so


class NoReference(RuntimeError):
    """This model cannot be run at full length with tokens hidden; says why."""


def find_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers: of all lists of ``num_hidden_layers`` modules the one with the most parameters.

    A multimodal model's towers, whose layers may be as many, are told by their names.
    """
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [
        module for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and not any(part in path for part in _TOWERS)
    ]  # fmt: skip
    if not lists:
        raise NoReference(f"{type(model).__name__} has no list of {count} layers")
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))


@contextlib.contextmanager
def full_attention_masks(model: nn.Module) -> Iterator[None]:
    """Have transformers make T x T masks: backends that make none (flash, flex) are exchanged for sdpa or eager."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [(c, c._attn_implementation) for c in configs if getattr(c, "_attn_implementation", None)]
    plain = "sdpa" if getattr(model, "_supports_sdpa", True) else "eager"
    changed = [(config, name) for config, name in before if name not in ("sdpa", "eager")]
    for config, _ in changed:
        config._attn_implementation = plain
    try:
        yield
    finally:
        for config, name in changed:
            config._attn_implementation = name


def hidden_keys(mask: Any, hide: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``mask`` of a layer with the keys ``hide`` (T,) out of everyone's sight but their own.

    ``mask`` is what transformers made: None for plain causal attention, booleans of either sense, numbers to add, with
    any axes before the last two, or one line for all queries.
    """
    tokens = len(hide)
    diagonal = torch.eye(tokens, dtype=torch.bool, device=hide.device)
    hidden = hide[None, :] & ~diagonal
    if mask is None:
        later = torch.ones_like(diagonal).triu(1)
        empty = torch.zeros(1, 1, tokens, tokens, dtype=dtype, device=hide.device)
        return empty.masked_fill(later | hidden, torch.finfo(dtype).min)
    if not torch.is_tensor(mask) or mask.shape[-1] != tokens:
        shape = tuple(mask.shape) if torch.is_tensor(mask) else type(mask).__name__
        raise NoReference(f"a layer got a mask of shape {shape} for {tokens} tokens")
    if mask.dim() == 2 and mask.shape[0] != tokens:  # (B, T): real tokens and padding, for all queries alike
        return mask.masked_fill(hide, 0)
    if mask.shape[-2] != tokens:
        mask = mask.expand(*mask.shape[:-2], tokens, tokens)
    if is_added(mask):
        return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
    means_visible = bool(mask[..., 0, 0].flatten()[0])  # a token sees itself
    return mask.masked_fill(hidden, not means_visible)


def is_added(mask: torch.Tensor) -> bool:
    """Whether ``mask`` is added to attention scores; else it is booleans, or zeros and ones."""
    return mask.is_floating_point() and (not bool(mask.any()) or not bool(((mask == 0) | (mask == 1)).all()))


def layer_masks(arguments: Mapping[str, Any], names: tuple[str, ...], tokens: int) -> list[str]:
    """Which arguments of a layer are masks of its self-attention: those that hold one, else ``attention_mask``."""
    known = dict.fromkeys([*names, *arguments])
    masks = [name for name in known if "mask" in name and not any(part in name for part in _OTHER_MASKS)]
    held = [name for name in masks if torch.is_tensor(arguments.get(name)) and arguments[name].shape[-1] == tokens]
    if not held and not masks:
        raise NoReference("its layers take no attention mask")
    return held or [next((name for name in masks if name == "attention_mask"), masks[0])]


@contextlib.contextmanager
def changed_masks(model: nn.Module, change: Any) -> Iterator[None]:
    """Inside the ``with`` each layer gets ``change(index, mask, dtype)`` for its mask."""

    def hook(index: int, names: tuple[str, ...]):
        def replace(_module: nn.Module, args: tuple, kwargs: dict[str, Any]):
            arguments = {**dict(zip(names, args, strict=False)), **kwargs}
            hidden = args[0] if args else next(iter(kwargs.values()))
            for name in layer_masks(arguments, names, hidden.shape[1]):
                new = change(index, arguments.get(name), hidden)
                if name in names[: len(args)]:
                    place = names.index(name)
                    args = (*args[:place], new, *args[place + 1 :])
                else:
                    kwargs = {**kwargs, name: new}
            return args, kwargs

        return replace

    handles = []
    with_state = layers_with_state(model)
    for index, layer in enumerate(find_layers(model)):
        if index in with_state:
            continue
        parameters = list(inspect.signature(type(layer).forward).parameters.values())[1:]
        names = tuple(p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
        handles.append(layer.register_forward_pre_hook(hook(index, names), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layers_with_state(model: nn.Module, words: tuple[str, ...] = _WITH_STATE) -> list[int]:
    """Layers without attention, by the configuration's word for each: what they see they take from a state."""
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    return [index for index, kind in enumerate(kinds) if kind in words]


def parts_with_state(model: nn.Module) -> dict[nn.Module, int]:
    """The modules that keep a state -> their layer: whole layers, or the one part beside a layer's attention."""
    layers = find_layers(model)
    found = {layers[index]: index for index in layers_with_state(model)}
    for index in layers_with_state(model, _WITH_BOTH):
        parts = [part for part in layers[index].children() if hasattr(part, "conv1d") or hasattr(part, "conv")]
        if len(parts) != 1:
            raise NoReference(f"layer {index} has {len(parts)} parts that keep a state")
        found[parts[0]] = index
    return found


@contextlib.contextmanager
def shorter_states(model: nn.Module, hide_at: Any) -> Iterator[None]:
    """Inside the ``with`` layers with a state run on the tokens that ``hide_at(index)`` (T,) does not hide."""
    handles = []

    def hooks(index: int):
        def before(_module: nn.Module, args: tuple, kwargs: dict[str, Any]):
            hide = hide_at(index)
            if args:
                return (args[0][:, ~hide.to(args[0].device)], *args[1:]), kwargs
            hidden = kwargs["hidden_states"]
            return args, {**kwargs, "hidden_states": hidden[:, ~hide.to(hidden.device)]}

        def after(_module: nn.Module, _args: tuple, output: Any):
            seen = ~hide_at(index)
            short = output[0] if isinstance(output, tuple) else output
            whole = short.new_zeros(short.shape[0], len(seen), *short.shape[2:])
            whole[:, seen.to(short.device)] = short
            return (whole, *output[1:]) if isinstance(output, tuple) else whole

        return before, after

    for part, index in parts_with_state(model).items():
        before, after = hooks(index)
        handles.append(part.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(part.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hidden_at(kept: Mapping[int, torch.Tensor], prompt_tokens: int, tokens: int, layer: int) -> torch.Tensor:
    """Boolean (T,): which tokens layer ``layer`` must not show to others."""
    hide = torch.zeros(tokens, dtype=torch.bool)
    for stage, positions in sorted(kept.items()):
        if stage <= layer:
            hide[:prompt_tokens] = True
            hide[positions.to(hide.device)] = False
    return hide


def masked_forward(
    model: nn.Module, tokens: torch.Tensor, kept: Mapping[int, torch.Tensor], prompt_tokens: int, **arguments: Any
) -> Any:
    """The model's output for one row of ``tokens`` (1, T), where from each stage on only kept prompt tokens are seen.

    Parameters
    ----------
    kept
        Stage -> positions (K,) of the prompt tokens that stay.
    prompt_tokens
        How many of ``tokens`` are the prompt; those after it are never hidden.

    Raises
    ------
    NoReference
        Where the model's layers take no mask that could say it.
    """

    def change(index: int, mask: Any, hidden: torch.Tensor) -> torch.Tensor:
        hide = hidden_at(kept, prompt_tokens, tokens.shape[1], index).to(hidden.device)
        return hidden_keys(mask, hide, hidden.dtype)

    def hide_at(index: int) -> torch.Tensor:
        return hidden_at(kept, prompt_tokens, tokens.shape[1], index)

    with torch.no_grad(), full_attention_masks(model), changed_masks(model, change), shorter_states(model, hide_at):
        return model(input_ids=tokens, use_cache=False, return_dict=True, **arguments)
