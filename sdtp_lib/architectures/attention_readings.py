"""Attention of the last tokens in each layer of a forward under way, read by hooks and without a graph.

Part of the door to transformers' internals (`architectures`); how one layer is asked, `attention_weights` knows.
Axes: B batch, T tokens, H heads, D hidden size.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sdtp_lib.architectures.attention_weights import attention_from_last, mask_rows, query_projection
from sdtp_lib.architectures.caches import without_cache
from sdtp_lib.architectures.layers import (
    Architecture,
    before_layers,
    describe,
    layer_signature,
    named_arguments,
)

_READABLE: weakref.WeakKeyDictionary[nn.Module, set[int]] = weakref.WeakKeyDictionary()


def refuse_unreadable(model: nn.Module | Architecture, layers: Sequence[int]) -> None:
    """Raise `PruningNotSupported` if the attention of ``layers`` cannot be read: tried once on a short prompt."""
    architecture = describe(model)
    known = _READABLE.setdefault(architecture.stack, set())
    asked = {layer for layer in layers if query_projection(architecture.layers[layer]) is None}
    if asked <= known:
        return
    model = architecture.model
    ids = torch.arange(8, device=model.get_input_embeddings().weight.device)[None] + 3
    with torch.no_grad(), attention_in_forward(architecture, asked, 4, lambda _, paid: paid.sum()):
        model(ids, use_cache=False)
    known |= asked


@contextlib.contextmanager
def attention_in_forward(
    model: nn.Module | Architecture,
    layers: Iterable[int],
    window: int,
    reduce: Callable[[int, torch.Tensor], torch.Tensor],
) -> Iterator[dict[int, torch.Tensor]]:
    """Layer -> ``reduce(layer, paid)``, paid (B, H, w, T) by the last ``window`` tokens; without a graph."""
    found: dict[int, torch.Tensor] = {}

    def read(index: int, layer: nn.Module, arguments: dict[str, Any]) -> None:
        paid = attention_from_last(layer, arguments["hidden_states"], without_cache(arguments), window)
        found[index] = reduce(index, paid)

    with _before_layers(model, layers, read):
        yield found


@contextlib.contextmanager
def attention_of_earlier_layers(
    model: nn.Module | Architecture,
    earlier_layers: Mapping[int, Sequence[int]],
    window: int,
    kept_at: Callable[[int], torch.Tensor],
) -> Iterator[dict[int, torch.Tensor]]:
    """What `Stage.attention_mass` would show in a pruned prefill, out of one unpruned forward over prompt and response.

    Yields stage -> Tensor (B, T, H x layers), filled by the forward without a graph; 0 outside the prompt.

    Parameters
    ----------
    earlier_layers
        Stage -> the earlier layers whose attention it reads.
    window
        Query tokens: the last of the prompt's kept ones.
    kept_at
        Layer -> the prompt's tokens kept there, (B, T) bool. Called before the layer runs, and after the attention that
        its own stage reads was filled in, except in families that show a stage its own layer.
    """
    architecture = describe(model)
    sources = sources_of(architecture, earlier_layers)
    paid: dict[int, torch.Tensor] = {}
    found: dict[int, torch.Tensor] = {}

    def read(index: int, layer: nn.Module, arguments: dict[str, Any]) -> None:
        paid[index] = _mass_in_prompts(layer, arguments, window, kept_at(index))
        for stage, layers in sources.items():
            if layers[-1] == index:
                found[stage] = torch.cat([paid[earlier].to(paid[index].device) for earlier in layers], dim=-1)

    with _before_layers(architecture, sorted({layer for layers in sources.values() for layer in layers}), read):
        yield found


def sources_of(
    model: nn.Module | Architecture, earlier_layers: Mapping[int, Sequence[int]]
) -> dict[int, tuple[int, ...]]:
    """Stage -> the layers whose attention it really reads in a prefill with a cache, when it wants to read these.

    As in `Stage.attention_mass`: in families whose queries cannot be computed apart from the keys, and where a layer's
    cache holds a window only, the stage's own layer stands for all others. If all of those see a window only, the last
    layer before the stage that sees all tokens stands for the first of them.

    Example, Gemma 3, whose layers 5, 11, .. see all tokens: stage 10 wants 7, 8, 9 and reads 5, 10, 10.
    """
    architecture = describe(model)
    windowed = architecture.windowed_layers()
    apart = all(query_projection(layer) is not None for layer in architecture.layers)
    found = {}
    for stage, layers in earlier_layers.items():
        kept = apart and all(architecture.sliding_window(layer) is None for layer in layers)
        shown = tuple(layers) if kept else (stage,) * len(layers)
        far = [layer for layer in range(stage) if layer not in windowed]
        found[stage] = (far[-1], *shown[1:]) if far and windowed.issuperset(shown) else shown
    return found


@contextlib.contextmanager
def _before_layers(
    model: nn.Module | Architecture, layers: Iterable[int], read: Callable[[int, nn.Module, dict[str, Any]], None]
) -> Iterator[None]:
    """Call ``read`` with each layer's arguments by name before it runs, without a graph."""

    def hook(index: int, layer: nn.Module):
        names = layer_signature(layer)

        @torch.no_grad()
        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            read(index, module, named_arguments(names, args, kwargs))

        return before

    with before_layers(model, layers, hook):
        yield


def _mass_in_prompts(
    layer: nn.Module, arguments: Mapping[str, Any], window: int, kept_tokens: torch.Tensor
) -> torch.Tensor:
    """(B, T, H) attention paid by each row's last ``window`` kept tokens, summed; 0 at tokens that are not kept."""
    hidden = arguments["hidden_states"]
    tokens, mass, whole = hidden.shape[1], [], without_cache(arguments)
    for row, kept in enumerate(kept_tokens.to(hidden.device)):
        own = {name: _cut(name, value, hidden.shape[:2], row, kept) for name, value in whole.items()}
        paid = attention_from_last(layer, hidden[row : row + 1, kept], own, window)[0].sum(dim=1)
        mass.append(paid.new_zeros(tokens, len(paid)).index_put((kept.nonzero()[:, 0],), paid.transpose(0, 1)))
    return torch.stack(mass)


def attention_received(
    layer: nn.Module,
    hidden: torch.Tensor,
    arguments: Mapping[str, Any],
    valid: torch.Tensor,
    windows: Sequence[int],
    rise: float = 1.0,
    chunk: int = 256,
) -> torch.Tensor:
    """(B, H, N) attention that the last ``windows[row]`` ``valid`` tokens of a row pay at ``layer``, summed by chunks.

    Queries in the middle are the last ones of a shorter prompt, since attention is causal. ``rise``
    weighs the queries linearly from 1 for the first to ``rise`` for the last.
    """
    rows, tokens = hidden.shape[:2]
    found: list[torch.Tensor] = []
    for row in range(rows):
        columns = valid[row].nonzero()[:, 0]
        count = len(columns)
        queries = min(windows[row], count)
        weights = torch.linspace(1.0, rise, queries, device=hidden.device)
        total = None
        # 10 tokens, all of them queries, by chunks of 4: queries 6 to 9 of the whole prompt, 2 to 5 of its first 6
        # tokens, 0 and 1 of its first 2. Each chunk needs (chunk, end) weights only.
        for end in range(count, count - queries, -chunk):
            size = min(chunk, end - (count - queries))
            kept = torch.zeros(tokens, dtype=torch.bool, device=hidden.device)
            kept[columns[:end]] = True
            own = {name: _cut(name, value, (rows, tokens), row, kept) for name, value in arguments.items()}
            paid = attention_from_last(layer, hidden[row : row + 1, kept], own, size)[0]
            first = end - size - (count - queries)
            summed = (paid * weights[first : first + size, None].to(paid.dtype)).sum(dim=1)
            if total is None:
                total = summed.new_zeros(len(summed), tokens)
            total[:, columns[:end]] += summed
        found.append(total)
    return torch.stack(found)


def _cut(name: str, value: Any, shape: tuple[int, int], row: int, kept: torch.Tensor) -> Any:
    """One argument of a layer for the ``kept`` tokens of one row only."""
    # Of 10 tokens 6 kept: alibi (B * H, 1, 10) -> (1, H, 1, 6), a mask (B or 1, 1, 10, 10) -> (1, 1, 6, 6), tables
    # (B or 1, 10, d) -> (1, 6, d). What has no token axis stays.
    rows, tokens = shape
    if isinstance(value, (tuple, list)):
        return type(value)(_cut(name, each, shape, row, kept) for each in value)
    if name == "attention_mask" and value is not None and not torch.is_tensor(value):
        value = mask_rows(value, tokens, tokens)
    if not torch.is_tensor(value):
        return value
    kept = kept.to(value.device)
    if name == "alibi":
        return value.reshape(rows, -1, 1, tokens)[row][..., kept]
    if name == "attention_mask" and value.dim() == 4:
        return value[row if value.shape[0] > 1 else 0][None][:, :, kept][..., kept]
    if value.dim() > 1 and value.shape[1] == tokens and value.shape[0] in (1, rows):
        return value[row if value.shape[0] > 1 else 0, kept][None]
    return value[kept] if value.dim() and value.shape[0] == tokens else value
