"""How many tokens stay at each stage, of each row and of each chunk: pure counting, known before a forward runs.

Where a prompt comes in chunks the budget is that of the whole prompt. At a stage every chunk keeps what may not be
dropped, and of the rest the same share as all others, to the token: the counts of all chunks add up to the whole
prompt's. Axes: B rows, L layers, c chunks.

Example: 100 tokens in chunks of 40, 40 and 20, of which 60 stay before layer 4; the first 4 and the last 16 always do.
Of the 80 others 40 stay: 18 of the 36 in the first chunk, 20 of 40 in the second, 2 of 4 in the last. So the chunks
keep 22, 20 and 18.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch

from sdtp_lib import budget
from sdtp_lib.config import PruningConfig, PruningNotSupported


class Budget(Protocol):
    """A `PruningConfig`, or a `budget.SpeedupBudget`."""

    def for_prompt(self, tokens: int) -> PruningConfig:
        """The configuration for a prompt of ``tokens``."""
        ...


def tokens_plan(wanted: Budget, num_layers: int, lengths: list[int]) -> list[list[int]]:
    """Tokens of each row in each layer (L lists of B), known before the prefill from the lengths alone.

    Where some tokens are protected by the caller or the budget is adaptive, at least so many stay.
    """
    by_length = {n: budget.tokens_per_layer(wanted.for_prompt(n), num_layers, n) for n in set(lengths)}
    return [[by_length[length][layer] for length in lengths] for layer in range(num_layers)]


def tokens_of(arguments: Mapping[str, Any]) -> torch.Tensor | None:
    """What a forward with these arguments is over: ids (B, T), or embeddings (B, T, D)."""
    tokens = arguments.get("input_ids")
    return tokens if tokens is not None else arguments.get("inputs_embeds")


def shape_of(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of the tokens of a forward with these arguments.

    Raises
    ------
    ValueError
        For tokens that stand in no rows.
    """
    tokens = tokens_of(arguments)
    if tokens is None:
        return 0, 0
    if not torch.is_tensor(tokens) or tokens.dim() < 2:
        found = f"a tensor of shape {tuple(tokens.shape)}" if torch.is_tensor(tokens) else f"a {type(tokens).__name__}"
        raise ValueError(f"the prompt is {found}: give input_ids (rows, tokens), such as input_ids[None] of one.")
    return int(tokens.shape[0]), int(tokens.shape[1])


def prompt_lengths(mask: Any, rows: int, columns: int) -> list[int]:
    """Real tokens of each row, read from a 2-D padding mask once, before any compute."""
    if mask is None:
        return [columns] * rows
    if not torch.is_tensor(mask) or mask.dim() != 2:
        shape = tuple(mask.shape) if torch.is_tensor(mask) else type(mask).__name__
        raise PruningNotSupported(
            f"attention_mask of shape {shape} hides which tokens are padding: give the 2-D mask (rows, tokens) of the "
            "tokenizer."
        )
    mask = mask[:, -columns:].bool()
    lengths = mask.sum(dim=1)
    left_padded = (mask == (torch.arange(columns, 0, -1, device=mask.device)[None] <= lengths[:, None])).all()
    if not bool(left_padded) or int(lengths.min()) == 0:
        raise PruningNotSupported(
            "attention_mask shows padding that is not on the left (or an empty row), which would move the last token: "
            "set tokenizer.padding_side = 'left' and tokenize again."
        )
    return lengths.tolist()


def chunk_size(tokens: int, size: int, queries: int) -> int:
    """The largest chunk size up to ``size`` at which the last of ``tokens``' chunks holds the ``queries`` query tokens.

    Raises
    ------
    ValueError
        Where there is none.
    """
    for smaller in range(size, max(queries, 1) - 1, -1):
        if (tokens - 1) % smaller + 1 >= queries:
            return smaller
    raise ValueError(
        f"prefill_chunk_size={size}: the last {queries} of the {tokens} tokens (the query tokens) go with each chunk, "
        f"and must fit into the last one: give {2 * queries} or more, or a scorer that reads fewer."
    )


def chunk_counts(
    config: PruningConfig, num_layers: int, bounds: Sequence[int], protect: torch.Tensor | None = None
) -> tuple[list[list[int]], dict[int, int]]:
    """Tokens of one row that each layer computes of each chunk, and how many of the last may not go at each stage.

    Parameters
    ----------
    bounds
        c + 1 positions among the row's own tokens: chunk i has ``bounds[i]`` to ``bounds[i + 1]``.
    protect : Tensor (n,) of bool, optional
        Further tokens that no stage drops.

    Returns
    -------
    counts : L lists of c ints
    local : dict
        Stage -> the last tokens that always stay there.
    """
    left = [end - start for start, end in pairwise(bounds)]
    total, found, local = bounds[-1], [], {}
    for layer in range(num_layers):
        if layer in config.layers and total >= config.min_prompt_tokens:
            count = sum(left)
            local[layer] = max(0, budget.protected_count(count, config) - config.sink_tokens)
            least = _protected(config.sink_tokens, local[layer], bounds, protect)
            kept = budget.keep_count(count, layer, config, None if protect is None else sum(least))
            left = shared_out(kept, least, left)
        found.append(list(left))
    return found, local


def _protected(sinks: int, local: int, bounds: Sequence[int], protect: torch.Tensor | None) -> list[int]:
    """How many protected tokens each chunk has."""
    total = bounds[-1]
    if protect is None:
        first, last = min(sinks, total), max(total - local, min(sinks, total))
        return [max(0, min(end, first) - start) + max(0, end - max(start, last)) for start, end in pairwise(bounds)]
    always = protect.clone()
    always[:sinks] = True
    always[max(0, total - local) :] = True
    return [int(always[start:end].sum()) for start, end in pairwise(bounds)]


def shared_out(total: int, least: Sequence[int], most: Sequence[int]) -> list[int]:
    """``total`` as one number per chunk, between its ``least`` and ``most``: what is above the least in proportion.

    Example: 7 with least 1, 0, 1 and most 5, 4, 3: the 5 above the least go 2, 2, 1 to rooms of 4, 4, 2.
    """
    room, spare = [high - low for low, high in zip(least, most, strict=True)], total - sum(least)
    before, given, found = 0, 0, []
    for low, own in zip(least, room, strict=True):
        before += own
        # Whole numbers only: rounding the running total keeps the sum, and no chunk gets more than it has room for.
        up_to_here = spare * before // max(1, sum(room))
        found.append(low + up_to_here - given)
        given = up_to_here
    return found


def on_device(counts: list[int], device: torch.device) -> torch.Tensor:
    """Counts as a tensor; equal ones are filled in on the device, which waits for nothing."""
    if min(counts) == max(counts):
        return torch.full((len(counts),), counts[0], dtype=torch.int64, device=device)
    return torch.tensor(counts, device=device)
