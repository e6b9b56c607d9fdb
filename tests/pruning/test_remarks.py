"""A ``with`` that prunes nothing says so once, with the reason, and its trace has it; not where nothing was to go."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import DynamicCache

from sdtp_lib import PruningConfig, methods, scorers, token_pruning
from sdtp_lib.architectures.caches import cache_argument, cache_in
from tests.pruning.chunked import needs_chunks

CONFIG = PruningConfig(layers=(1, 3, 4), keep_ratio=0.6, min_local_tokens=4)
PROMPT = torch.randint(3, 128, (1, 300), generator=torch.Generator().manual_seed(1))
ALL = torch.ones(1, 300, dtype=torch.bool)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(num_hidden_layers=8)


def _said(model, wanted, scorer=None, *, calls=2, tokens=300, call=None, **options):
    """What is warned of in one ``with`` of several prefills, and its trace."""
    call = call or (lambda ids: model(input_ids=ids))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with torch.no_grad(), token_pruning(model, wanted, scorer or scorers.recency(), **options) as trace:
            for _ in range(calls):
                call(PROMPT[:, :tokens])
    return [str(warning.message) for warning in found], trace


def _method(name, **changes):
    return lambda model: (methods.get(name, **changes), methods.get(name, **changes).scorer_for(model))


@pytest.mark.parametrize(
    ("given", "tokens", "options", "reason"),
    [
        (lambda _: (CONFIG,), 300, {"protect": ALL}, "all 300 tokens of the prompt are protected"),
        (lambda _: (CONFIG.replace(keep_tokens=9),), 300, {"protect": ALL}, "all 300 tokens of the prompt are protect"),
        (lambda _: (CONFIG.replace(keep_mass=1.0), scorers.attention(4)), 300, {},
         "the scores of attention leave out none of the prompt's 300 tokens (keep_mass=1;"),
        (_method("uniprefill"), 300, {}, "the scores of uniprefill leave out none of the prompt's 300 tokens"),
        (_method("specprefill"), 30, {}, "the scores of specprefill leave out none of the prompt's 30 tokens"),
        (lambda _: (CONFIG,), 6, {}, "the prompt of 6 tokens is too short to prune: the first 4 and the last 4 tokens"),
        (lambda _: (CONFIG.replace(keep_tokens=2),), 6, {}, "the prompt of 6 tokens is too short to prune"),
        (lambda _: (CONFIG.replace(keep_mass=0.5),), 6, {}, "the prompt of 6 tokens is too short to prune"),
        (lambda _: ("2x",), 6, {}, "the prompt of 6 tokens is too short to prune: the first 4 and the last 16 tokens"),
        (lambda _: (CONFIG.replace(keep_tokens=301),), 300, {}, "no longer than what is kept (keep_tokens=301)"),
        (_method("sliminfer"), 300, {}, "no longer than what is kept (keep_tokens=2048 or more)"),
        (_method("pyramidinfer"), 60, {}, "the prompt of 60 tokens is no longer than what is kept"),
        (_method("snapkv"), 300, {}, "no longer than what the KV cache of each layer keeps"),
    ],
)  # fmt: skip
def test_a_with_that_prunes_nothing_says_why_once_and_its_trace_has_the_reason(model, given, tokens, options, reason):
    """Protected prompts and scores that leave out nothing passed in silence; what was said, the trace had not."""
    said, trace = _said(model, *given(model), tokens=tokens, **options)
    assert trace.tokens_per_layer[-1] == tokens
    assert len(said) == 1 and reason in said[0]
    assert reason in trace.not_pruned and f"not pruned: {trace.not_pruned}" in str(trace)


@pytest.mark.parametrize("wanted", [1.0, "1x", CONFIG.replace(keep_ratio=1.0), methods.named("lazyllm@1x")], ids=str)
def test_where_nothing_was_to_go_nothing_is_said(model, wanted):
    said, trace = _said(model, wanted, scorers.recency() if isinstance(wanted, (str, float)) else None)
    assert trace.tokens_per_layer == [300] * 8 and said == [] and trace.not_pruned == ""


@pytest.mark.parametrize("given", [_method("gemfilter", tokens=60), _method("snapkv", tokens=90), _method("fastkv")])
def test_where_tokens_or_keys_went_nothing_is_said(model, given):
    said, trace = _said(model, *given(model))
    assert said == [] and trace.not_pruned == ""
    assert max(trace.keys_per_layer or [60]) <= 90


def test_without_a_cache_a_method_that_cuts_only_that_says_so(model):
    method = methods.get("h2o")
    said, trace = _said(model, method, call=lambda ids: model(input_ids=ids, use_cache=False))
    assert len(said) == 1 and "only the KV cache is to be cut, and the forward has none" in said[0]
    assert trace.not_pruned in said[0]


def test_the_reason_is_that_of_the_last_prefill(model):
    with torch.no_grad(), pytest.warns(UserWarning, match="6 tokens"), token_pruning(model, CONFIG, "recency") as trace:
        model(input_ids=PROMPT[:, :6])
        assert "6 tokens is too short" in trace.not_pruned
        model(input_ids=PROMPT)
        assert trace.not_pruned == ""
        model(input_ids=PROMPT[:, :5])
    assert "5 tokens is too short" in trace.not_pruned


@pytest.mark.parametrize("broken", [0, 3, 7])
def test_a_prefill_that_ends_in_an_error_leaves_no_plan_as_if_it_had_been(model, broken):
    """The trace had shown what the prefill was going to keep, in memory that had run out on the way."""

    def runs_out(*_):
        raise MemoryError("no room")

    with torch.no_grad(), token_pruning(model, CONFIG, scorers.recency()) as trace:
        model(input_ids=PROMPT)
        whole = str(trace)
        hook = model.model.layers[broken].register_forward_pre_hook(runs_out)
        with pytest.raises(MemoryError):
            model(input_ids=PROMPT)
        hook.remove()
        assert str(trace) == "not pruned: the last prefill ended in an error"
        assert trace.prefills == 1 and not trace.kept_positions and not trace.scores
        with pytest.raises(ValueError, match="the trace is empty: the last prefill ended in an error"):
            _ = trace.compression_ratio
        model(input_ids=PROMPT)
        assert str(trace) == whole and trace.prefills == 2


def test_a_row_that_stays_whole_beside_one_that_is_cut_is_no_remark(model):
    ids, protect = PROMPT.expand(2, -1), torch.zeros(2, 300, dtype=torch.bool)
    protect[0] = True
    said, trace = _said(model, CONFIG, protect=protect, call=lambda _: model(input_ids=ids))
    assert trace.tokens_per_row[-1, 0] == 300 > trace.tokens_per_row[-1, 1] and said == [] and trace.not_pruned == ""


@needs_chunks
def test_a_prompt_in_chunks_is_judged_as_a_whole_after_the_last(model):
    def call(ids):
        model.generate(ids, max_new_tokens=3, do_sample=False, prefill_chunk_size=40)

    few = torch.zeros(1, 300, dtype=torch.bool)
    few[0, :40] = True  # the first chunk stays whole, the others are cut
    said, trace = _said(model, CONFIG, scorers.attention(4), call=call, protect=few)
    assert said == [] and trace.not_pruned == "" and trace.tokens_per_layer[-1] < 300
    said, trace = _said(model, CONFIG, scorers.attention(4), call=call, protect=ALL)
    assert len(said) == 1 and "all 300 tokens of the prompt are protected" in said[0]
    assert trace.not_pruned in said[0] and trace.tokens_per_layer == [300] * 8


def test_turns_that_are_not_cut_are_said_once_under_every(model):
    config = CONFIG.replace(prune="every")
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match="prompt of 7 tokens is too short") as said,
        token_pruning(model, config, scorers.recency()) as trace,
    ):
        cache = cache_in(model(input_ids=PROMPT, use_cache=True))
        assert trace.not_pruned == ""
        for _ in range(2):
            model(input_ids=PROMPT[:, :7], **cache_argument(model, cache))
        assert "7 tokens is too short" in trace.not_pruned
        model(input_ids=PROMPT[:, :1], **cache_argument(model, cache))
    assert len(said) == 1 and trace.prefills == 3 and trace.prompt_lengths == [7]


@pytest.mark.parametrize(
    ("changes", "added", "reason", "warned"),
    [
        ({}, 9, "the cache held 12 token(s) before the first forward inside the `with`", True),
        ({"prune": "every"}, 1, "one token was added to a cache that held 12", True),
        ({"prune": "every", "min_prompt_tokens": 20}, 9, "(9 tokens) is no longer than min_prompt_tokens=20", False),
    ],
)
def test_what_is_added_to_a_cache_from_before_has_its_reason_at_once(model, changes, added, reason, warned):
    """The trace had the reason only once the ``with`` was left, and under ``prune="every"`` never."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=PROMPT[:, :12], **cache_argument(model, cache))

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with torch.no_grad(), token_pruning(model, CONFIG.replace(**changes), scorers.recency()) as trace:
            for _ in range(2):
                model(input_ids=PROMPT[:, :added], **cache_argument(model, cache))
            assert reason in trace.not_pruned and str(trace) == f"not pruned: {trace.not_pruned}"
    assert [reason in str(warning.message) for warning in found] == [True] * warned
    assert trace.prefills == 0


def test_what_is_added_to_a_cache_from_before_is_no_reason_beside_a_prefill_that_was_pruned(model):
    """The trace is of that prefill: it would say that nothing was pruned beside what was."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=PROMPT[:, :12], **cache_argument(model, cache))
        with token_pruning(model, CONFIG, scorers.recency()) as trace:
            model(input_ids=PROMPT)
            with pytest.warns(UserWarning, match="nothing is pruned: the cache held 12"):
                model(input_ids=PROMPT[:, :9], **cache_argument(model, cache))
    assert trace.not_pruned == "" and trace.prompt_lengths == [300] and "not pruned" not in str(trace)
