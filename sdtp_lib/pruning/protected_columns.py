"""Which new tokens of one forward no stage drops: what ``protect`` says, and what stands for images and the like.

Axes: B rows, C new columns.
"""

from __future__ import annotations

import torch

from sdtp_lib.architectures.layers import Architecture
from sdtp_lib.config import PruningNotSupported


def protected_columns(
    architecture: Architecture,
    protect: torch.Tensor | None,
    ids: torch.Tensor | None,
    shape: tuple[int, int],
    seen: int,
    times: int = 1,
) -> torch.Tensor | None:
    """Booleans (B, C), or None where nothing is protected beyond the first and last tokens.

    Parameters
    ----------
    protect
        As given to ``token_pruning``; it may cover what the cache holds as well. Of later turns it says nothing.
    ids
        What a multimodal model was called with.
    shape, seen
        B and C, and how many tokens the cache holds.
    times
        How often ``generate`` repeats each row of its prompt.

    Raises
    ------
    ValueError
        If ``protect`` does not fit the prompt.
    PruningNotSupported
        For a multimodal model without ``ids``.
    """
    asked = _asked_for(protect, shape, seen, times)
    if not architecture.placeholders:
        return asked
    if ids is None or ids.shape != shape:
        raise PruningNotSupported(
            f"{type(architecture.model).__name__} without input_ids of {shape[0]} row(s) of {shape[1]} tokens, so "
            "which of them stand for images is not known: call the model itself, with input_ids."
        )
    stand_in = torch.isin(ids, torch.tensor(architecture.placeholders, device=ids.device))
    if not bool(stand_in.any()):
        return asked
    return stand_in if asked is None else stand_in | asked.to(ids.device)


def _asked_for(protect: torch.Tensor | None, shape: tuple[int, int], seen: int, times: int) -> torch.Tensor | None:
    rows, columns = shape
    if protect is None or (seen and protect.shape[1] < seen + columns):
        return None
    given = protect.shape[0]
    if given not in (1, rows, rows // times) or protect.shape[1] != seen + columns:
        raise ValueError(
            f"protect has shape {tuple(protect.shape)}, but the prompt is {rows} row(s) of {seen + columns} tokens: "
            "give one boolean per token, padding included."
        )
    own = protect[:, seen:]
    # As transformers does: rows a, b and two beams are a, a, b, b.
    return own.expand(rows, -1) if given in (1, rows) else own.repeat_interleave(times, dim=0)
