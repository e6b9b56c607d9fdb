"""Which columns each layer of a cache holds once a prefill has cut: the record that the cache takes along.

Knows what was cut where and what the cache held before; neither scores nor layers' inputs.

Axes: B rows, T new columns (padding included), n columns that a layer holds.

Example: a prefix of 3 columns that all layers hold, 5 new ones of which 0, 3, 4 stay before layer 4. Layers 0 to 3 hold
all eight; from layer 4 on the record says columns 0, 1, 2, 3, 6, 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sdtp_lib.architectures.caches import cached_tokens
from sdtp_lib.architectures.layers import Architecture
from sdtp_lib.pruning.pruned_cache import CacheRecord

# First layer, the new columns (B, K) that it and those after it were given, whether any of them is padding.
Segment = tuple[int, torch.Tensor, bool]


def record_of(
    cache: Any,
    before: CacheRecord | None,
    segments: Sequence[Segment],
    seen: int,
    columns: int,
    lengths: Sequence[int],
    num_layers: int,
    architecture: Architecture,
    compact: bool,
) -> CacheRecord:
    """The record of ``cache`` after a prefill of ``columns`` columns on top of ``seen`` ones.

    Parameters
    ----------
    before
        What the cache remembered until now.
    segments
        The cuts, in their order.
    lengths
        Real tokens of each row among the new columns.
    """
    layers, joined, with_state = range(num_layers), {}, architecture.state_layers
    ends = [next((s for s in reversed(segments) if s[0] <= layer), (0, None, False)) for layer in layers]
    answers = next(layer for layer in layers if layer not in with_state)  # where transformers asks for layer 0
    held = [0 if layer in with_state else cached_tokens(cache, layer) for layer in layers]
    kept = [_all_held(before, layer, ends[layer][1], seen, columns, len(lengths), joined) for layer in layers]
    if kept[0] is not None or 0 in with_state:
        held[0] = seen + columns  # what layer 0 answers from now on, also where a second pass cut it
    expected = [held[0] if known is None or not layer else known.shape[1] for layer, known in enumerate(kept)]
    held = [expected[layer] if layer in with_state else count for layer, count in enumerate(held)]
    return CacheRecord(
        columns=held[0],
        rows=len(lengths),
        kept=kept,
        padded=[ends[layer][2] or (before is not None and before.padded[layer]) for layer in layers],
        any_padding=min(lengths) < columns or (before is not None and before.any_padding),
        held=held,
        compressed=held != expected or (not seen and held[0] != columns),
        compact=compact,
        backend=architecture.backend,
        answers=answers,
    )


def _all_held(
    before: CacheRecord | None,
    layer: int,
    new: torch.Tensor | None,
    seen: int,
    columns: int,
    rows: int,
    joined: dict[Any, torch.Tensor],
) -> torch.Tensor | None:
    """Columns (B, n) that ``layer`` holds: what it held before, and ``new``, what it kept of the new ones."""
    old = None if before is None else before.kept[layer]
    if not seen or (new is None and old is None):
        return new
    if (id(old), id(new)) not in joined:  # layers between two cuts share one tensor
        device = (new if new is not None else old).device
        covered = 0 if old is None else before.columns
        fresh = torch.arange(columns, device=device)[None] if new is None else new
        parts = [torch.arange(covered, seen, device=device)[None], fresh.where(fresh < 0, fresh + seen)]
        parts = parts if old is None else [old.to(device), *parts]
        joined[id(old), id(new)] = torch.cat([part.expand(rows, -1) for part in parts], dim=1)
    return joined[id(old), id(new)]
