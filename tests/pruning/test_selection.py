"""Scores to kept columns: protection, ties, padding, and the gather, against a plain loop."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdtp_lib.pruning.selection import gather_tokens, select_positions


def _by_hand(scores, count, kept, sinks, local):
    """The same rule written as a loop over one row."""
    columns = list(range(len(scores) - count, len(scores)))
    protected = set(columns[:sinks]) | set(columns[len(columns) - min(local, count) :])
    others = sorted((c for c in columns if c not in protected), key=lambda c: (scores[c], c), reverse=True)
    chosen = sorted([*protected, *others[: kept - len(protected)]])
    return chosen


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_selection_equals_the_rule_written_as_a_loop(data):
    rows = data.draw(st.integers(1, 3))
    counts = [data.draw(st.integers(6, 20)) for _ in range(rows)]
    sinks, local = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 3))
    kept = [data.draw(st.integers(max(1, sinks + local), count)) for count in counts]
    width = max(counts)
    # Few distinct values, so that ties are common.
    values = data.draw(st.lists(st.integers(-2, 2), min_size=rows * width, max_size=rows * width))
    scores = torch.tensor(values, dtype=torch.float32).reshape(rows, width)
    chosen = select_positions(scores, counts, kept, sinks, [local] * rows)
    assert chosen.shape == (rows, max(kept))
    for row in range(rows):
        real = chosen[row][chosen[row] >= 0].tolist()
        assert real == _by_hand(scores[row].tolist(), counts[row], kept[row], sinks, local)
        assert (chosen[row][: max(kept) - kept[row]] == -1).all()


def test_equal_and_all_zero_scores_go_to_the_later_tokens():
    chosen = select_positions(torch.zeros(1, 10), [10], [6], 2, [1])
    assert chosen.tolist() == [[0, 1, 6, 7, 8, 9]]


def test_negative_zero_ties_with_zero():
    scores = torch.tensor([[0.0, -0.0, 0.0, -0.0]])
    assert select_positions(scores, [4], [2], 0, [0]).tolist() == [[2, 3]]


def test_what_stands_at_padding_is_ignored_even_if_it_is_not_a_number():
    scores = torch.tensor([[float("nan"), float("inf"), 1.0, 3.0, 2.0, 0.0]])
    assert select_positions(scores, [4], [2], 0, [0]).tolist() == [[3, 4]]


def test_selection_leaves_the_scores_as_they_were():
    scores = torch.arange(8.0)[None]
    select_positions(scores, [8], [4], 2, [1])
    assert torch.equal(scores, torch.arange(8.0)[None])


def test_gather_takes_rows_of_their_own_and_shares_tables_of_batch_one():
    values = torch.arange(24.0).reshape(2, 4, 3)
    columns = torch.tensor([[0, 2], [-1, 3]])
    gathered = gather_tokens(values, columns)
    assert torch.equal(gathered, torch.stack([values[0, [0, 2]], values[1, [0, 3]]]))
    table = torch.arange(4.0).reshape(1, 4, 1)
    assert gather_tokens(table, columns)[..., 0].tolist() == [[0.0, 2.0], [0.0, 3.0]]
    assert gather_tokens(values.transpose(1, 2), columns, dim=2).shape == (2, 3, 2)


def test_protected_padding_takes_no_tokens_place():
    """It did: where ``protect`` held padding too, 10 of a row's 13 places went to it, and its sinks with them."""
    scores = torch.arange(12.0).repeat(2, 1)
    protected = torch.zeros(2, 12, dtype=torch.bool)
    protected[:, :5] = True
    found = select_positions(scores, [12, 7], [8, 4], 1, [2, 2], protected)
    assert found[0].tolist() == [0, 1, 2, 3, 4, 9, 10, 11]
    assert found[1].tolist() == [-1, -1, -1, -1, 5, 9, 10, 11]
