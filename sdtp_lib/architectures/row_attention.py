"""Attention row by row under sdpa: rows of different length in one forward, without padding and without a T x T mask.

Part of the door to transformers' internals. For as long as one forward lasts, a name of our own in transformers'
registries lets it make `RowMask`s and lets the layers attend by them. Decoder layers then run on the tokens of all rows
behind one another, (1, sum of lengths, D), which no padding is part of; the cache keeps its form.

Axes: B rows, N tokens of all rows, n padded columns, H heads, G key-value heads, d head size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sdtp_lib.architectures.attention_interface import own_attention
from sdtp_lib.architectures.row_masks import RowMask

# Families whose decoder layers treat each token by itself but for attention, hand their mask to transformers' attention
# interface untouched and their keys to the cache right before it. Each is held against its rows alone in the tests.
FAMILIES = frozenset({
    "llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "smollm3", "gemma3_text", "gpt_neox", "mixtral",
    "qwen2_moe", "qwen3_moe", "olmoe",
})  # fmt: skip
# Hooks on layers that know of packed rows, or do nothing unless asked for what is refused here.
_KNOWN_HOOKS = ("sdtp_lib.pruning.session", "transformers.utils.output_capturing")
_PER_LAYER_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")


def serves_rows(architecture: Any, wanted: dict[str, Any]) -> bool:
    """Whether a forward of this `Architecture`, called with the arguments ``wanted``, may run on packed rows."""
    stack, layers, config = architecture.stack, architecture.layers, architecture.config
    if architecture.model_type not in FAMILIES or not type(layers[0]).__module__.startswith("transformers.models."):
        return False
    if config._attn_implementation != "sdpa" or getattr(stack, "config", None) is not config:
        return False
    if any(wanted.get(name) or getattr(config, name, False) for name in _PER_LAYER_OUTPUTS):
        return False  # what leaves a layer would be packed
    if len({parameter.device for layer in (layers[0], layers[-1]) for parameter in layer.parameters()}) > 1:
        return False
    return not any(_foreign_hooks(module) for layer in layers for module in layer.modules())


def _foreign_hooks(module: nn.Module) -> bool:
    """Somebody else's hooks, which would meet packed tensors: a KV-cache compression, a recorder."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return bool(hooks) and any(getattr(hook, "__module__", "") not in _KNOWN_HOOKS for hook in hooks)


class MasksMade:
    """Which masks a forward made: all as `RowMask`, or some that it cannot describe."""

    def __init__(self) -> None:
        self.others = False


@contextlib.contextmanager
def masks_by_rows(config: Any) -> Iterator[MasksMade]:
    """Inside, transformers makes a `RowMask` where that describes the mask, and layers that read ``config`` use it."""
    made, usual = MasksMade(), ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def make(*args: Any, **arguments: Any) -> Any:
        window = _window_of(arguments) if not args else None
        if window is None or made.others:
            made.others = True
            return usual(*args, **arguments)
        real = arguments["attention_mask"]
        new = arguments.get("q_length")
        if new is None:  # transformers < 5.4
            queries = arguments["cache_position"].to(real.device)
        else:
            queries = torch.arange(new, device=real.device) + arguments.get("q_offset", 0)
        keys = torch.arange(arguments["kv_length"], device=real.device) + arguments.get("kv_offset", 0)
        return RowMask(queries[None], keys[None], real, window or None, {"make": usual, **arguments})

    with own_attention(config, attend_by_rows, "sdpa", make):
        yield made


def as_usual(mask: RowMask) -> Any:
    """The mask that transformers makes in the place of ``mask``."""
    arguments = dict(mask.arguments)
    return arguments.pop("make")(**arguments)


def _window_of(arguments: dict[str, Any]) -> int | None:
    """0 for plain causal attention, the window of a sliding one; None where a `RowMask` cannot say it."""
    padding = arguments.get("attention_mask")
    if arguments.get("use_vmap") or not arguments.get("allow_is_causal_skip", True):
        return None
    if not torch.is_tensor(padding) or padding.dim() != 2 or padding.dtype != torch.bool:
        return None
    function, window = arguments.get("mask_function", causal_mask_function), arguments.get("local_size")
    if window is None:
        return 0 if function is causal_mask_function else None
    # Chunks are local, too: asked of the function itself, a window of 3 lets token 3 see 1, 2 and itself.
    axes = [torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=padding.device) for _ in range(2)]
    query = torch.full((1, 1, 1, 1), window, device=padding.device)
    seen = function(*axes, query, torch.arange(window + 2, device=padding.device)[None, None, None]).flatten().tolist()
    return window if seen == [False, *[True] * window, False] else None


def attend_by_rows(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """As transformers' function for sdpa; by a `RowMask` each row of the packed ``query`` (1, H, N, d) by itself.

    ``key`` and ``value`` are packed as well, or, out of a cache, padded (B, G, n, d).
    """
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if not isinstance(attention_mask, RowMask):
        return attend(module, query, key, value, attention_mask, **options)
    output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
    cached, start = key.shape[0] == len(attention_mask.counts), 0
    for row, count in enumerate(attention_mask.counts):
        # Without a cache a row's keys lie where its queries do.
        own = (key[row : row + 1], value[row : row + 1]) if cached else (
            key[:, :, start : start + count], value[:, :, start : start + count]
        )  # fmt: skip
        for some, places, mask in attention_mask.blocks(row, own[0].shape[2]):
            keys, values = (held[:, :, places] for held in own)
            asked = query[:, :, start + some.start : start + some.stop]
            mask = None if mask is None else mask[None, None]
            output[:, start + some.start : start + some.stop] = attend(module, asked, keys, values, mask, **options)[0]
        start += count
    return output, None


def pack(values: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """The last ``counts[b]`` tokens of each row of (B or 1, n, ...) behind one another: (1, N, ...)."""
    width, shared = values.shape[1], values.shape[0] == 1
    return torch.cat([values[0 if shared else row, width - count :] for row, count in enumerate(counts)])[None]


def unpack(values: torch.Tensor, counts: Sequence[int], width: int, dim: int = 1) -> torch.Tensor:
    """Rows (B, ..., width, ...) out of (1, ..., N, ...) along ``dim``, zeros on the left of shorter ones.

    A ``width`` below a row's count gives its last so many tokens only.
    """
    shape = list(values.shape)
    shape[0], shape[dim] = len(counts), width
    rows, end = values.new_zeros(shape), 0
    for row, count in enumerate(counts):
        end, taken = end + count, min(count, width)
        rows[row].narrow(dim - 1, width - taken, taken).copy_(values[0].narrow(dim - 1, end - taken, taken))
    return rows


class RowsCache:
    """A cache as packed layers see it: what they hand over is stored by rows, padded on the left, as ever."""

    def __init__(self, cache: Any, counts: Sequence[int], width: int) -> None:
        self._cache, self._counts, self._width = cache, counts, width

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Store (1, G, N, d) as (B, G, n, d); returns all that the layer holds, by rows."""
        by_rows = (unpack(new, self._counts, self._width, dim=2) for new in (keys, values))
        return self._cache.update(*by_rows, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)
