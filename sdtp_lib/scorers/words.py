"""Long words scored as one, and so kept or dropped whole: identifiers, addresses, paths are of no use in part.

A word is a run of tokens without white space, of ASCII letters, digits and signs; other scripts have no spaces to go
by, and each of their tokens stands alone. Knows token ids and scores, not who scored.
Axes: B batch, N kept tokens, V tokens of the vocabulary.

Example: of the tokens ``The``, `` key``, `` 7``, ``f``, ``3``, ``9``, ``-``, .. ``4``, `` is`` the third to the last
but one are one word, of 36 for a UUID, and get the mean of its scores each; the others keep their own. A number of
seven digits is one in the first half of the stages alone: late layers can do with some of its digits, and a tight
budget has no room for all (LOG.md).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Kept tokens of a word that counts as one: at least, at least in the later half of the stages, at most. In others each
# token counts.
LEAST, LEAST_LATER, MOST = 6, 12, 64
_CONTINUES, _BEGINS, _ALONE = 0, 1, 2
# White space as byte-level BPE and SentencePiece write it.
_WHITE = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": "\n", "ĉ": "\t", "č": "\r"})
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def word_table(tokenizer: Any) -> Tensor:
    """(V + 1,) of uint8: whether a token continues the word before it (0), begins one (1) or stands alone (2).

    The last entry is for ids that the tokenizer does not have.

    Raises
    ------
    ValueError
        For what is no tokenizer of transformers.
    """
    needed = ("all_special_ids", "convert_ids_to_tokens", "__len__")
    if lacking := [name for name in needed if not hasattr(tokenizer, name)]:
        raise ValueError(
            f"tokenizer={type(tokenizer).__name__} has no {lacking[0]}: give a tokenizer of transformers, such as "
            "AutoTokenizer's; of a processor, its .tokenizer."
        )
    special = set(tokenizer.all_special_ids)
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    kinds = [_ALONE if number in special else _kind(piece) for number, piece in enumerate(pieces)]
    return torch.tensor([*kinds, _ALONE], dtype=torch.uint8)


def is_word_table(table: Tensor) -> bool:
    """Whether ``table`` is one of `word_table`'s, by its form."""
    return table.dtype == torch.uint8 and table.dim() == 1 and len(table) > 0 and int(table.max()) <= _ALONE


def _kind(piece: str | bytes | None) -> int:
    if isinstance(piece, bytes):  # tokenizers by tiktoken
        piece = piece.decode("latin-1")
    byte = _BYTE.fullmatch(piece or "")
    text = chr(int(byte[1], 16)) if byte else (piece or "").translate(_WHITE)
    if not text.strip() or not text.isascii() or text[-1].isspace():
        return _ALONE
    return _BEGINS if text[0].isspace() else _CONTINUES


def words_of(ids: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """(B, N) of int64: which word of its row each of the tokens ``ids`` (B, N) belongs to, ascending.

    Tokens whose ``positions`` (B, N) are not adjacent share none: a chunk of a prompt and the query tokens behind it,
    or what an earlier cut left. So a word across the border of two chunks is two.
    """
    unknown = len(table) - 1
    kinds = table[ids.masked_fill(ids < 0, unknown).clamp_max(unknown)]
    begins = kinds != _CONTINUES
    begins[:, 1:] |= (kinds[:, :-1] == _ALONE) | (positions[:, 1:] - positions[:, :-1] != 1)
    return begins.cumsum(dim=1)


def least_at(layer: int, layers: Sequence[int]) -> int:
    """Kept tokens that make a word one at ``layer``, of the ``layers`` that pruners were made for; of five, the first
    three ask for less."""
    return LEAST if layers.index(layer) < (len(layers) + 1) // 2 else LEAST_LATER


def whole_words(scores: Tensor, words: Tensor, valid: Tensor | None, least: int = LEAST) -> Tensor:
    """``scores`` (B, N) with the mean of each word of ``least`` to `MOST` kept tokens in the place of its tokens' own.

    Parameters
    ----------
    words
        (B, N), ascending: as `words_of` gave them for the whole prompt, cut to the kept tokens.
    valid
        (B, N) bool; None: all. What is not valid belongs to no word.
    """
    apart = words[:, 1:] != words[:, :-1]
    real = torch.ones_like(scores)
    if valid is not None:  # padding adds nothing to whichever word it stands in
        real, scores = valid.to(scores.dtype), scores.masked_fill(~valid, 0)
    # Words of kept tokens [3, 3, 7, 9, 9] become [0, 0, 1, 2, 2]: places to add up in, without asking the device.
    place = torch.nn.functional.pad(apart.long().cumsum(dim=1), (1, 0))
    size, total = (torch.zeros_like(scores).scatter_add(1, place, each).gather(1, place) for each in (real, scores))
    mean = total / size.clamp_min(1)
    # Where a cut goes through a word its own scores decide: they count a ten-thousandth.
    return torch.where((size >= least) & (size <= MOST), mean + 1e-4 * (scores - mean), scores)
