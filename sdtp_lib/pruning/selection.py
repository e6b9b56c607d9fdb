"""From scores to the tokens that stay: pure functions of tensors.

Knows no model, no configuration object and no scorer. A *stage layout* is left-padded: row b's ``counts[b]`` kept
tokens are its last columns. Axes: B rows, N columns before the cut, K after it, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def select_positions(
    scores: torch.Tensor,
    counts: Sequence[int],
    kept: Sequence[int],
    sink_tokens: int,
    local_tokens: Sequence[int],
    protected: torch.Tensor | None = None,
) -> torch.Tensor:
    """Columns that stay, in their order: the protected ones, then the highest scores; ties go to the later token.

    Parameters
    ----------
    scores : Tensor (B, N)
        Higher is more important. Columns left of a row's tokens (padding) are ignored, whatever they hold.
    counts, kept : ints, one per row
        Tokens before the cut, and how many of them stay (``0 < kept <= counts``).
    sink_tokens : int
        The first tokens of each row that always stay.
    local_tokens : ints, one per row
        The last tokens of each row that always stay. Protected tokens must fit into ``kept``.
    protected : Tensor (B, N) of bool, optional
        Further tokens that always stay; padding never counts as one.

    Returns
    -------
    Tensor (B, K) of int64, K = max(kept)
        Ascending columns; rows that keep fewer are padded on the left with -1.

    Examples
    --------
    T = 10; row 0 keeps 6 of 10 tokens, row 1 (two columns of padding) 5 of 8. Two sinks and the last three always stay;
    in row 0 that leaves one place, for column 4, the best of columns 2 to 6::

        select_positions(scores, counts=[10, 8], kept=[6, 5], sink_tokens=2, local_tokens=[3, 3])
        [[ 0, 1, 4, 7, 8, 9],
         [-1, 2, 3, 7, 8, 9]]
    """
    columns = scores.shape[1]
    width = max(kept)
    ranking = scores.detach().clone()
    if protected is not None:
        ranking = ranking.masked_fill(protected, torch.inf)
    for row, (count, local) in enumerate(zip(counts, local_tokens, strict=True)):
        first = columns - count
        ranking[row, :first] = -torch.inf
        ranking[row, first : first + sink_tokens] = torch.inf
        ranking[row, columns - min(local, count) :] = torch.inf
    # A stable sort of the reversed row puts the later of two equal scores first, so a run repeats exactly.
    order = columns - 1 - ranking.flip(1).argsort(dim=1, descending=True, stable=True)
    chosen = order[:, :width]
    if min(kept) < width:
        spare = torch.arange(width, device=scores.device) >= torch.tensor(kept, device=scores.device)[:, None]
        chosen = chosen.masked_fill(spare, -1)
    return chosen.sort(dim=1).values


def protected_tokens(
    counts: Sequence[int], columns: int, sink_tokens: int, local_tokens: Sequence[int], protected: torch.Tensor
) -> torch.Tensor:
    """Which of the N columns may not be dropped, (B, N): the first and last of each row, and ``protected`` (B, N)."""
    index = torch.arange(columns, device=protected.device)
    found = []
    for row, (count, local) in enumerate(zip(counts, local_tokens, strict=True)):
        first = columns - count
        ends = (index < first + sink_tokens) | (index >= columns - local) | protected[row]
        found.append(ends & (index >= first))
    return torch.stack(found)


def count_for_mass(scores: torch.Tensor, mass: float) -> int:
    """How many of the best of ``scores`` (N,) hold the share ``mass`` of their sum. Waits for the device once.

    Example: scores 0.5, 0.3, 0.1, 0.1 and a mass of 0.75: the best two, which hold 0.8.
    """
    order = scores.double().clamp_min(0).sort(descending=True).values.cumsum(0)
    # A last place of rounding must not cost a token: shares that are equal on paper are equal here.
    return min(int((order < mass * order[-1] * (1 - 1e-12)).sum()) + 1, len(scores))


def gather_tokens(values: torch.Tensor, columns: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """``values`` at ``columns`` (B, K) along the token axis ``dim``; padding (-1) repeats the first column.

    ``values`` may have batch size 1 where ``columns`` has B rows (rotary tables, position ids): it is shared then.
    Example: hidden states (2, 10, D) at the columns (2, 6) of `select_positions` above are (2, 6, D). Row 1's padding
    is a copy of column 0; it is masked wherever it is read.
    """
    columns = columns.clamp_min(0).to(values.device)
    if columns.shape[0] == 1:
        return values.index_select(dim, columns[0])
    if values.shape[0] == 1:
        values = values.expand(columns.shape[0], *values.shape[1:])
    shape = [columns.shape[0]] + [1] * (values.dim() - 1)
    shape[dim] = columns.shape[1]
    target = list(values.shape)
    target[dim] = columns.shape[1]
    return values.gather(dim, columns.view(shape).expand(target))
