"""Scorers: one protocol, and each baseline's own promise."""

from __future__ import annotations

import pytest
import torch

from sdtp_lib import PruningConfig, scorers, token_pruning

CONFIG = PruningConfig(layers=(2, 4), keep_ratio=0.5, min_local_tokens=4, sink_tokens=2)
ALL = {
    "random": scorers.random(seed=3),
    "recency": scorers.recency(),
    "uniform": scorers.uniform(),
    "hidden norm": scorers.hidden_norm(),
    "attention": scorers.attention(window=4),
    "attention, pooled": scorers.attention(window=4, kernel=5),
    "attention, nobody asks": scorers.attention(query="none"),
}


def _run(model, scorer, prompt, config=CONFIG):
    with torch.no_grad(), token_pruning(model, config, scorer) as trace:
        model(input_ids=prompt)
    return trace


@pytest.mark.parametrize("name", ALL)
def test_every_scorer_repeats_exactly_and_gives_finite_scores_of_the_right_shape(tiny_model, name):
    model, prompt = tiny_model(), torch.arange(3, 63)[None]
    first, second = _run(model, ALL[name], prompt), _run(model, ALL[name], prompt)
    assert scorers.name_of(ALL[name]) == name
    for layer in CONFIG.layers:
        assert first.scores[layer].shape == first.scored_positions[layer].shape
        assert torch.isfinite(first.scores[layer]).all()
        assert torch.equal(first.kept_positions[layer], second.kept_positions[layer])


def test_recency_keeps_the_sinks_and_the_latest_tokens(tiny_model):
    trace = _run(tiny_model(), scorers.recency(), torch.arange(3, 63)[None])
    assert trace.kept_positions[2][0].tolist() == [0, 1, *range(32, 60)]


def test_hidden_norm_is_the_norm_of_what_enters_the_layer(tiny_model):
    from sdtp_lib.architectures.layers import layer_inputs

    model, prompt = tiny_model(), torch.arange(3, 63)[None]
    trace = _run(model, scorers.hidden_norm(), prompt)
    with torch.no_grad(), layer_inputs(model, [2]) as seen:
        model(input_ids=prompt)
    torch.testing.assert_close(trace.scores[2], seen[2].norm(dim=-1))


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "olmo2", "gpt_neox", "gpt2", "bloom", "gemma3_text"])
def test_attention_scores_are_the_attention_weights_that_the_model_itself_reports(tiny_model, family):
    overrides = {"n_positions": 512, "n_embd": 32, "n_layer": 6, "n_head": 4} if family == "gpt2" else {}
    model, prompt = tiny_model(family, attn_implementation="eager", **overrides), torch.arange(3, 63)[None]
    with torch.no_grad():
        reported = model(input_ids=prompt, output_attentions=True).attentions[2]
    trace = _run(model, scorers.attention(window=4), prompt)
    torch.testing.assert_close(trace.scores[2], reported[:, :, -4:].mean(dim=(1, 2)), rtol=1e-4, atol=1e-6)


def test_where_nobody_asks_all_later_tokens_count_alike(tiny_model):
    """Token i sees i + 1 tokens: in even shares of that, the mean over all that see a token."""
    model, prompt = tiny_model(attn_implementation="eager"), torch.arange(3, 63)[None]
    with torch.no_grad():
        paid = model(input_ids=prompt, output_attentions=True).attentions[2].mean(dim=1)[0]
    even = paid * torch.arange(1, 61)[:, None]
    expected = torch.stack([even[place:, place].mean() for place in range(60)])
    trace = _run(model, scorers.attention(query="none"), prompt)
    torch.testing.assert_close(trace.scores[2][0], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="query='all' is unknown"):
        scorers.attention(query="all")


def test_reading_attention_leaves_no_name_behind_in_transformers_registries(tiny_model):
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = (set(ALL_ATTENTION_FUNCTIONS), set(ALL_MASK_ATTENTION_FUNCTIONS))
    model = tiny_model()
    backend = model.config._attn_implementation
    _run(model, scorers.attention(), torch.arange(3, 63)[None])
    assert (set(ALL_ATTENTION_FUNCTIONS), set(ALL_MASK_ATTENTION_FUNCTIONS)) == before
    assert model.config._attn_implementation == backend


def test_given_scores_follow_original_positions_through_all_stages(tiny_model):
    wanted = torch.zeros(1, 60)
    wanted[0, 20:28] = 1.0
    trace = _run(tiny_model(), scorers.given({2: wanted, 4: wanted}), torch.arange(3, 63)[None])
    assert set(range(20, 28)) <= set(trace.kept_positions[4][0].tolist())
    assert torch.equal(trace.scores[4][0], wanted[0, trace.scored_positions[4][0]])


def test_given_scores_of_another_length_or_layer_are_refused(tiny_model):
    prompt = torch.arange(3, 63)[None]
    with pytest.raises(ValueError, match=r"layer 2 have shape \(1, 50\).*60 tokens"):
        _run(tiny_model(), scorers.given({2: torch.zeros(1, 50), 4: torch.zeros(1, 50)}), prompt)
    with pytest.raises(ValueError, match=r"layers \[2, 4\].*layers \[2\]"):
        _run(tiny_model(), scorers.given({2: torch.zeros(1, 60)}), prompt)


def test_random_scores_depend_on_the_seed_and_not_on_the_batch(tiny_model):
    model, prompt = tiny_model(), torch.arange(3, 63)[None]
    alone = _run(model, scorers.random(seed=1), prompt)
    pair = _run(model, scorers.random(seed=1), prompt.expand(2, -1))
    other = _run(model, scorers.random(seed=2**40), prompt)
    assert torch.equal(alone.scores[2][0], pair.scores[2][1])
    assert not torch.equal(alone.scores[2], other.scores[2])
    assert 0.4 < alone.scores[2].mean() < 0.6
    assert alone.scores[2].unique().numel() == 60


def test_a_weighted_sum_with_one_part_keeps_the_same_tokens_as_the_part(tiny_model):
    model, prompt = tiny_model(), torch.arange(3, 63)[None]
    part = _run(model, scorers.attention(4), prompt)
    whole = _run(model, scorers.weighted([(scorers.attention(4), 2.0)]), prompt)
    assert torch.equal(part.kept_positions[4], whole.kept_positions[4])
    torch.testing.assert_close(whole.scores[2].mean(), torch.tensor(0.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("arguments", [{"window": 0}, {"kernel": 2}, {"kernel": 0}])
def test_impossible_windows_and_kernels_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        scorers.attention(**arguments)
    with pytest.raises(ValueError, match="names no scorer"):
        scorers.weighted([])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_the_short_way_to_queries_and_keys_equals_the_layers_own(tiny_model, family, monkeypatch):
    from sdtp_lib.architectures import attention_weights as door

    model, prompt = tiny_model(family, dtype=torch.float64), torch.arange(3, 63)[None]
    monkeypatch.setattr(door, "_SPLIT_PROJECTIONS", ())
    own = _run(model, scorers.attention(4), prompt).scores
    monkeypatch.setattr(door, "_SPLIT_PROJECTIONS", (family,))
    monkeypatch.setattr(door, "_capture", None)
    short = _run(model, scorers.attention(4), prompt).scores
    for layer in CONFIG.layers:
        # Their own functions take the softmax in float32.
        torch.testing.assert_close(short[layer], own[layer], rtol=0, atol=1e-7)


def test_a_uniform_score_keeps_the_same_share_everywhere(tiny_model):
    config = CONFIG.replace(min_local_tokens=1, local_ratio=0.0, sink_tokens=1)
    kept = _run(tiny_model(), scorers.uniform(), torch.arange(3, 123)[None], config).kept_positions
    for stage, share in ((2, 0.5), (4, 0.25)):
        for start in range(0, 120, 20):
            count = int(((kept[stage] >= start) & (kept[stage] < start + 20)).sum())
            assert abs(count - 20 * share) <= 2


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: scorers.attention("8"), "window='8' is not a whole number"),
        (lambda: scorers.attention(2.5), "window=2.5 is not a whole number"),
        (lambda: scorers.given([torch.ones(1, 3)]), "scores is a list"),
        (lambda: scorers.given({2: None}), "scores of layer 2 are a NoneType: give a tensor"),
        (lambda: scorers.given({2: "abc"}), "scores of layer 2 are a str"),
        (lambda: scorers.given({"x": torch.ones(1, 3)}), "layer='x' is not a whole number"),
        (lambda: scorers.given({1.7: torch.ones(1, 3)}), "layer=1.7 is not a whole number"),
        (lambda: scorers.random(1.5), "seed=1.5 is not a whole number"),
        (lambda: scorers.random("a"), "seed='a' is not a whole number"),
        (lambda: scorers.weighted([("recency", 1.0)]), "parts has 'recency', which cannot be called"),
        (lambda: scorers.weighted({scorers.recency(): 1.0}), "names no scorers with their weights: give "),
        (lambda: scorers.weighted([scorers.recency()]), "names no scorers with their weights"),
        (lambda: scorers.weighted(None), "parts=None names no scorers"),
        (lambda: scorers.weighted([(scorers.recency, 1.0)]), "scorer=recency makes a scorer"),
        (lambda: scorers.weighted([(scorers.recency(), float("nan"))]), "weight=nan is not a number"),
        (lambda: scorers.weighted([(scorers.recency(), "a")]), "weight='a' is not a number"),
    ],
)
def test_nonsense_is_refused_by_name_when_a_score_is_made(make, match):
    with pytest.raises(ValueError, match=match):
        make()
