"""Hybrids: layers that keep one state of what they were given run on the kept tokens, beside layers with attention.

The reference for such a layer is the model run on the kept tokens from that layer on (`masked_reference`).
"""

from __future__ import annotations

import contextlib

import family_models
import pytest
import torch
from family_checks import CHECKS, ENGINE
from family_subject import RIGHT, UNASKED, Subject, judged

from sdtp_lib import PruningConfig, PruningNotSupported, scorers, token_pruning
from sdtp_lib.architectures import describe
from sdtp_lib.architectures.caches import cache_in, tokens_seen
from sdtp_lib.budget import SpeedupBudget, prefill_flops
from sdtp_lib.model_shape import ModelShape
from sdtp_lib.pruning.masked_reference import masked_forward
from sdtp_lib.training.labels import checked_labels

HYBRIDS = ("lfm2", "qwen3_next", "qwen3_5_text", "granitemoehybrid", "jamba", "bamba", "falcon_h1", "nemotron_h")
CONFIG = PruningConfig(layers=(1, 3), keep_ratio=0.6, min_local_tokens=4, local_ratio=0.0)


def _built(family):
    if family not in family_models.families():
        pytest.skip(f"this transformers has no {family}")
    model = family_models.tiny_model(family, "sdpa")
    if not describe_or_skip(model).with_state:
        pytest.skip(f"this transformers keeps the states of {family} in a cache of its own")
    return model


def describe_or_skip(model):
    try:
        return describe(model)
    except PruningNotSupported as refused:
        pytest.skip(str(refused))


@pytest.mark.parametrize("check", ENGINE)
@pytest.mark.parametrize("family", HYBRIDS)
def test_a_hybrid_equals_its_state_layers_on_the_kept_tokens_alone(family, check):
    found = judged(CHECKS[check], Subject(_built(family)))
    if (family, check) == ("jamba", "second turn"):  # transformers begins Jamba's states anew where tokens are added
        assert found.outcome == UNASKED, found
        assert "the plain model's second turn differs" in found.detail
    else:
        assert found.outcome == RIGHT, found


@pytest.mark.parametrize("family", HYBRIDS)
def test_the_flops_of_a_hybrid_are_what_torch_counts(family):
    _built(family)
    found = judged(CHECKS["flops"], Subject(family_models.tiny_model(family, "eager")))
    assert found.outcome == RIGHT, found


@pytest.mark.parametrize("family", ["lfm2", "falcon_h1"])
def test_a_speed_up_is_solved_for_a_hybrid(family):
    model = _built(family)
    shape = ModelShape.from_model(model)
    budget = SpeedupBudget(PruningConfig((1, 2, 3), 0.5, min_local_tokens=4, local_ratio=0.0), 1.5, shape)
    with torch.no_grad(), token_pruning(model, budget, scorers.recency()) as trace:
        model(input_ids=torch.arange(5, 105)[None], use_cache=True)
    saved = prefill_flops(shape, [100] * 6) / prefill_flops(shape, trace.tokens_per_layer)
    assert 1.5 <= saved < 1.6


def test_the_reference_hides_a_dropped_token_from_states_too():
    """A dropped token's own value changes nothing that is kept: neither through attention nor through a state."""
    model = _built("lfm2")
    tokens = torch.arange(5, 45)[None]
    other = tokens.clone()
    other[0, 10] = 99
    kept = {1: torch.tensor([n for n in range(40) if n != 10])}
    found, changed = (masked_forward(model, ids, {0: kept[1]}, 40).logits for ids in (tokens, other))
    assert torch.equal(found[:, kept[1]], changed[:, kept[1]])
    assert not torch.equal(model(input_ids=tokens).logits[:, 11:], model(input_ids=other).logits[:, 11:])


def test_the_cache_counts_all_tokens_where_its_first_layer_with_keys_was_cut():
    """transformers takes the length of the first layer with keys for that of the whole cache."""
    model = _built("lfm2")
    assert describe(model).state_layers == {0, 2, 4}
    with torch.no_grad(), token_pruning(model, CONFIG, scorers.recency()) as trace:
        cache = cache_in(model(input_ids=torch.arange(5, 69)[None], use_cache=True))
        assert tokens_seen(cache) == 64
        assert cache.layers[1].keys.shape[2] == trace.tokens_per_layer[1] == 38


def test_rows_of_one_length_that_keep_different_numbers():
    model = _built("lfm2")
    tokens = torch.stack([torch.arange(5, 69), torch.arange(70, 6, -1)])
    protect = torch.zeros(2, 64, dtype=torch.bool)
    protect[0, 2:60] = True
    with torch.no_grad(), token_pruning(model, CONFIG, scorers.recency(), protect=protect) as trace:
        found = model(input_ids=tokens, use_cache=True).logits
    assert trace.tokens_per_row[3].tolist() == [64, 22], "one row is protected nearly whole"
    for row in (0, 1):
        says = pytest.warns(UserWarning, match="all 64 tokens .* protected") if row == 0 else contextlib.nullcontext()
        own = protect[row : row + 1]
        with torch.no_grad(), says, token_pruning(model, CONFIG, scorers.recency(), protect=own):
            alone = model(input_ids=tokens[row : row + 1], use_cache=True).logits[0]
        torch.testing.assert_close(found[row, -len(alone) :], alone, rtol=0, atol=1e-6)


def test_a_score_that_reads_attention_is_refused_before_a_layer_that_has_none():
    model = _built("lfm2")
    config = CONFIG.replace(layers=(2, 3))
    with (
        pytest.raises(PruningNotSupported, match=r"no attention module.*'recency'"),
        token_pruning(model, config, scorers.attention(4)),
    ):
        raise AssertionError("refused on entry")


def test_labels_are_refused_since_a_state_is_in_none_of_them():
    """MiniMax's gradient label was off by 2 % and nobody said so."""
    with pytest.raises(PruningNotSupported, match=r"layers \[.*\] keep a state instead of keys.*in any label"):
        checked_labels(_built("lfm2"), [1], "gradient_x_hidden")


def test_chunks_are_refused_since_a_state_gives_no_query_tokens_back():
    model = _built("lfm2")
    with (
        token_pruning(model, CONFIG, scorers.recency()),
        pytest.raises(PruningNotSupported, match="prefill_chunk_size=16 with layers that keep a state"),
    ):
        model.generate(torch.arange(5, 69)[None], prefill_chunk_size=16, max_new_tokens=2, eos_token_id=None)


def test_a_model_of_states_alone_is_refused():
    with pytest.raises(PruningNotSupported, match="keeps a state of all tokens"):
        describe(family_models.weightless_model("mamba", "eager"))


def test_llama_4_is_refused_from_where_its_layers_count_positions_themselves():
    config = family_models.tiny_config("llama4_text")
    assert config.attn_temperature_tuning
    model = family_models.tiny_model("llama4_text", "sdpa")
    model.config.floor_scale = 32
    tokens = torch.arange(5, 69)[None]
    with torch.no_grad(), token_pruning(model, CONFIG, scorers.recency(), verify="never"):
        model(input_ids=tokens[:, :31])
        with pytest.raises(PruningNotSupported, match="at most 31 tokens"):
            model(input_ids=tokens)
