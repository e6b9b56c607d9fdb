"""What became of each token: read off a trace, or cut out of the scores of one unpruned run as the engine would."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from sdtp_lib.config import PruningConfig
from sdtp_lib.pruning.token_fates import TokenFates, simulate, stage_colours

BARE = {"sink_tokens": 0, "local_ratio": 0.0, "min_local_tokens": 0}


def _trace():
    return SimpleNamespace(
        tokens_per_layer=[4, 4, 3, 2],
        prompt_lengths=np.array([2, 4]),
        kept_positions={2: np.array([[-1, 0, 1], [0, 2, 3]]), 3: np.array([[0, 1], [0, 3]])},
        scored_positions={2: np.array([[-1, -1, 0, 1], [0, 1, 2, 3]]), 3: np.array([[-1, 0, 1], [0, 2, 3]])},
        scores={
            2: np.array([[-np.inf, -np.inf, 5.0, 6.0], [9.0, 1.0, 3.0, 4.0]]),
            3: np.array([[-np.inf, 7.0, 8.0], [9.0, 2.0, 5.0]]),
        },
    )


def test_a_row_of_a_trace_becomes_its_tokens_fates():
    fates = TokenFates.from_trace(_trace(), row=1)
    assert fates.dropped_at.tolist() == [4, 2, 3, 4]
    assert fates.tokens_per_layer() == [4, 4, 3, 2]
    assert np.array_equal(fates.scores, [[9, 1, 3, 4], [9, np.nan, 2, 5]], equal_nan=True)
    assert [fates.layer_label(p) for p in (0, 1)] == ["kept to the end", "dropped before layer 2"]
    assert fates.dropped_per_stage() == [1, 1] and fates.kept_count == 2
    assert fates.compression_ratio() == pytest.approx(4 / 3.25)


def test_padding_of_a_shorter_row_is_nobodys_token():
    fates = TokenFates.from_trace(_trace(), row=0)
    assert fates.tokens == 2 and fates.dropped_at.tolist() == [4, 4]
    assert fates.scores.tolist() == [[5, 6], [7, 8]]


def test_a_drop_at_a_layer_that_is_no_stage_is_refused():
    with pytest.raises(ValueError, match=r"layer\(s\) \[3\]"):
        TokenFates(np.array([3, 5]), (2,), 5, np.zeros((1, 2)))


def test_the_lowest_scores_go_first_and_ties_go_to_the_later_token():
    config = PruningConfig(layers=(1, 2), keep_ratio=0.5, **BARE)
    scores = {1: [4.0, 1.0, 1.0, 1.0, 3.0, 1.0], 2: [0.0, 9.0, 9.0, 9.0, 1.0, 2.0]}
    fates = simulate(scores, config, 3)
    assert fates.dropped_at.tolist() == [2, 1, 1, 1, 2, 3]
    assert fates.approximate and np.isnan(fates.scores[1, 1])


def test_sinks_and_last_tokens_stay_whatever_their_scores():
    config = PruningConfig(layers=(1,), keep_ratio=0.5, sink_tokens=2, local_ratio=0.2, min_local_tokens=1)
    fates = simulate({1: np.r_[0, 0, np.ones(6), 0, 0]}, config, 2)
    assert (fates.dropped_at == 2).nonzero()[0].tolist() == [0, 1, 7, 8, 9]


def test_scores_are_put_in_the_order_of_their_positions():
    config = PruningConfig(layers=(1,), keep_ratio=0.5, **BARE)
    fates = simulate({1: [1.0, 2.0]}, config, 2, positions={1: [1, 0]})
    assert fates.dropped_at.tolist() == [2, 1]


def test_a_stage_without_scores_is_refused_by_name():
    with pytest.raises(ValueError, match=r"layer\(s\) \[2\].*\[1\]"):
        simulate({1: [1.0]}, PruningConfig(layers=(1, 2)), 3)


@pytest.mark.filterwarnings("ignore:the prompt of 10 tokens is too short")
@pytest.mark.parametrize("tokens", [10, 57, 300])
@pytest.mark.parametrize("ratio", [0.5, 0.7, 0.9, 1.0])
def test_fixed_scores_are_cut_exactly_as_the_engine_cuts_them(tiny_model, tokens, ratio):
    import torch

    from sdtp_lib import scorers, token_pruning

    model = tiny_model("llama")
    config = PruningConfig(layers=(1, 3, 4), keep_ratio=ratio)
    # few distinct values, so that ties decide as well
    scores = {layer: torch.randint(0, 5, (1, tokens)).double() for layer in config.layers}
    with torch.no_grad(), token_pruning(model, config, scorers.given(scores)) as trace:
        model(torch.randint(3, 100, (1, tokens)), use_cache=True, logits_to_keep=1)
    real = TokenFates.from_trace(trace)
    cut = simulate({layer: values[0] for layer, values in scores.items()}, config, model.config.num_hidden_layers)
    assert np.array_equal(cut.dropped_at, real.dropped_at)
    assert np.array_equal(cut.scores, real.scores, equal_nan=True)
    assert real.tokens_per_layer() == list(trace.tokens_per_layer)


def test_stage_colours_grow_darker_so_that_their_order_shows_in_grey():
    lightness = [0.3 * r + 0.59 * g + 0.11 * b for r, g, b in stage_colours(9)]
    assert lightness == sorted(lightness, reverse=True)
    assert len(set(stage_colours(9))) == 9 and len(stage_colours(1)) == 1
