"""The rows and columns of a mask: whatever stood in the whole one stands in the cut one."""

from __future__ import annotations

import pytest
import torch

from sdtp_lib import PruningNotSupported
from sdtp_lib.architectures.masks import cut_mask, last_rows

ROWS = torch.tensor([[0, 2, 5], [-1, 3, 5]])


def _cut(mask, queries=ROWS, keys=ROWS, padded=True, backend="sdpa"):
    return cut_mask(mask, queries, keys, padded, query_count=3, backend=backend, dtype=torch.float32)


def test_each_entry_of_a_cut_mask_is_the_entry_of_its_query_and_its_key():
    whole = torch.randn(2, 3, 6, 6)
    cut = _cut(whole)
    assert cut.shape == (2, 3, 3, 3)
    for row in range(2):
        for q, query in enumerate(ROWS[row].tolist()):
            for k, key in enumerate(ROWS[row].tolist()):
                if query >= 0 and key >= 0:
                    assert torch.equal(cut[row, :, q, k], whole[row, :, query, key])


def test_padding_is_seen_by_nobody_but_itself():
    booleans = _cut(torch.ones(1, 1, 6, 6, dtype=torch.bool))
    assert booleans[1, 0].tolist() == [[True, True, True], [False, True, True], [False, True, True]]
    added = _cut(torch.zeros(2, 1, 6, 6))
    lowest = torch.finfo(torch.float32).min
    assert added[1, 0].tolist() == [[0, 0, 0], [lowest, 0, 0], [lowest, 0, 0]]


def test_columns_alone_are_cut_for_tokens_that_follow_a_pruned_prompt():
    whole = torch.arange(2 * 9).view(1, 1, 2, 9)
    keys = torch.tensor([[0, 3, 7, 8]])
    assert _cut(whole, None, keys, padded=False)[0, 0].tolist() == [[0, 3, 7, 8], [9, 12, 16, 17]]


def test_no_mask_stays_none_unless_rows_keep_different_numbers():
    assert _cut(None, padded=False) is None
    made = _cut(None)
    assert made[0, 0].tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert made[1, 0].tolist() == [[True, False, False], [False, True, False], [False, True, True]]
    assert _cut(None, backend="flash_attention_2").tolist() == [[1, 1, 1], [0, 1, 1]]
    assert _cut(None, backend="eager").dtype == torch.float32


def test_a_two_dimensional_mask_of_flash_attention_is_cut_by_columns():
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
    assert _cut(mask, backend="flash_attention_2").tolist() == [[1, 1, 1], [0, 1, 1]]


def test_a_block_mask_of_flex_attention_asks_the_whole_one():
    from torch.nn.attention.flex_attention import create_block_mask

    whole = create_block_mask(lambda _b, _h, q, k: (k <= q) & (q - k < 3), 1, None, 6, 6, device="cpu")
    keys = torch.tensor([[0, 2, 3, 5]])
    cut = _cut(whole, keys, keys, padded=False, backend="flex_attention")
    index = torch.arange(4)
    seen = cut.mask_mod(torch.zeros((), dtype=torch.int64), 0, index[:, None], index[None, :])
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert seen.int().tolist() == expected


def test_a_mask_of_a_form_that_nobody_knows_is_refused_by_its_shape():
    with pytest.raises(PruningNotSupported, match=r"attention_mask \(2, 6, 6\).*sdpa"):
        _cut(torch.ones(2, 6, 6))


def test_last_rows_are_those_of_the_last_queries():
    whole = torch.arange(12).view(1, 1, 4, 3)
    assert last_rows(whole, 2)[0, 0].tolist() == [[6, 7, 8], [9, 10, 11]]
    assert last_rows(None, 2) is None
    assert last_rows(torch.ones(1, 4), 2) is None
