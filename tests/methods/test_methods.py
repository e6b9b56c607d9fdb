"""The registry, equal FLOPs, generation under every method, and what they refuse."""

from __future__ import annotations

import dataclasses

import numpy
import pytest
import torch

from sdtp_lib import PruningConfig, PruningNotSupported, budget, methods, scorers, token_pruning
from sdtp_lib.architectures.caches import cache_argument, cache_in
from sdtp_lib.methods.method import Method, depth, depths
from sdtp_lib.methods.votes import best_blocks, block_means, votes
from sdtp_lib.model_shape import ModelShape
from sdtp_lib.pruning.engine import kv_budget, two_passes
from sdtp_lib.pruning.kv_budget import KVBudget
from sdtp_lib.pruning.second_pass import TwoPasses
from tests.reference import louder

SMALL = {
    "gemfilter": {"tokens": 60}, "sliminfer": {"tokens": (160, 96, 64), "block": 16, "window": 16},
    "uniprefill": {"mass": 0.8, "block": 16, "window": 20, "ends": 20}, "streamingllm": {"tokens": 80},
    "snapkv": {"tokens": 90}, "specprefill": {"keep": 0.3, "chunk": 16}, "sdtp-low": {"preset": "keep08"},
}  # fmt: skip
CACHE_ONLY = ("snapkv", "h2o")
IDS = torch.randint(3, 128, (1, 300), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(tiny_model):
    return louder(tiny_model(dtype=torch.float64, num_hidden_layers=8))


def inside(model, method, call, scorer=None):
    with torch.no_grad(), token_pruning(model, method, method.scorer_for(model) or scorer) as trace:
        return call(), trace


def test_a_method_is_had_by_its_papers_name_with_its_papers_settings_and_single_changes():
    assert methods.names() == [
        "sdtp", "sdtp-low", "sdtp-fast", "lazyllm", "gemfilter", "fastkv", "claa", "sliminfer", "uniprefill", "asl",
        "pyramidinfer", "streamingllm", "snapkv", "h2o", "specprefill", "earlier-scheme",
    ]  # fmt: skip
    for name in methods.names():
        method = methods.get(name)
        assert isinstance(method, Method) and method.name == name and len(method.paper) == 10
    assert methods.get("fastkv").keep == 0.2 and methods.get("fastkv", keep=0.3).keep == 0.3


def test_an_unknown_name_or_setting_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"method='FastKv' is unknown: .*sdtp, .*did you mean 'fastkv'\?"):
        methods.get("FastKv")
    with pytest.raises(ValueError, match=r"method='zebra' is unknown: .*claa.*scheme\.$"):
        methods.get("zebra")
    with pytest.raises(ValueError, match=r"fastkv has no setting 'ratio': it has speedup, cut_depth, keep"):
        methods.get("fastkv", ratio=0.5)


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [("fastkv", "speedup", float("nan")), ("fastkv", "speedup", 0.5), ("fastkv", "speedup", "2x"),
     ("fastkv", "speedup", True), ("fastkv", "keep", 2.5), ("fastkv", "kv", -0.1), ("fastkv", "kernel", 4),
     ("fastkv", "cut_depth", float("nan")), ("claa", "cut_depth", "half"), ("claa", "window", 0),
     ("asl", "threshold", "low"), ("asl", "keep", -1), ("asl", "layers_compared", 2.5), ("gemfilter", "tokens", None),
     ("gemfilter", "positions", "compacted"), ("lazyllm", "stages", 0.5), ("lazyllm", "keep", ("a", "b", "c")),
     ("sliminfer", "tokens", 64), ("uniprefill", "mass", 1.5), ("uniprefill", "block", 0),
     ("uniprefill", "layers_read", 3), ("pyramidinfer", "decay", 2), ("pyramidinfer", "least", -1),
     ("specprefill", "keep", -1), ("specprefill", "chunk", True), ("snapkv", "window", None), ("h2o", "keep", 0)],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_refused_by_name_when_the_method_is_made(name, setting, value):
    """FastKV of ``keep=2.5`` dropped nothing, ASL of ``keep=-1`` all but 8 tokens; ``speedup=nan`` dropped 96 %."""
    with pytest.raises(ValueError, match=f"^{setting}="):
        methods.get(name, **{setting: value})


def test_settings_of_numpy_and_lists_are_plain_ones_and_every_default_passes_as_it_is():
    made = methods.get("lazyllm", stages=[0.3, 0.6], keep=numpy.array([0.5, 0.25]))
    assert (made.stages, made.keep) == ((0.3, 0.6), (0.5, 0.25)) and type(made.keep[0]) is float
    assert type(methods.get("snapkv", tokens=numpy.int64(9)).tokens) is int
    for method in map(methods.get, methods.names()):
        for field in dataclasses.fields(method):
            found = getattr(method, field.name)
            assert (found, type(found)) == (field.default, type(field.default)), f"{method.name}: {field.name}"
            if field.name not in ("preset", "pruners", "draft"):
                assert field.name in method.checks, f"{method.name}: nothing looks at {field.name}"


def test_a_cache_method_that_was_given_a_speedup_refuses_it_where_it_is_used(model):
    for name in CACHE_ONLY:
        with pytest.raises(methods.SpeedupOutOfReach, match=f"speedup=2.0: {name} shortens the cache only"):
            methods.get(name, speedup=2).budget_for(model)


@pytest.mark.parametrize("value", ["2x", None, [2], 2 + 0j, float("nan"), 0.5])
def test_a_speedup_that_is_none_is_refused_by_its_value(value):
    with pytest.raises(ValueError, match="^speedup="):
        methods.get("fastkv").at_speedup(value)


@pytest.mark.parametrize("value", [None, 5, [], b"fastkv"])
def test_a_method_is_named_by_a_text(value):
    for name in (methods.named, methods.get):
        with pytest.raises(ValueError, match="^method="):
            name(value)


def test_a_rule_that_one_dial_does_not_scale_says_so_beside_the_name_of_a_scaled_method_only():
    for name in (name for name in methods.names() if name not in CACHE_ONLY):
        own, scaled = methods.get(name), methods.get(name).at_speedup(2.0)
        adaptive = own.config(32).keep_mass is not None
        assert bool(own.differs_at_speedup) == (adaptive or name == "fastkv"), name
        assert own.remark == own.differs
        assert scaled.remark == "; ".join(filter(None, (own.differs, own.differs_at_speedup))), name
    assert "10 % of the prompt's keys" in methods.get("fastkv").at_speedup(1.5).remark
    assert methods.get("fastkv", kv=None).at_speedup(1.5).remark == ""
    assert "99 % of the attention" in methods.get("uniprefill").at_speedup(2.0).remark
    assert methods.get("specprefill", draft=object()).remark == ""


def test_depths_are_shares_of_the_layers():
    assert [depth(16 / 32, layers) for layers in (32, 28, 8)] == [16, 14, 4]
    assert depths((10 / 32, 20 / 32, 30 / 32), 28) == (9, 18, 26) and depths((0.3, 0.6, 0.9), 2) == (1,)
    assert methods.get("gemfilter").config(32).layers == (13,) and methods.get("fastkv").config(32).layers == (16,)


@pytest.mark.parametrize("name", methods.names())
def test_generate_goes_on_from_what_a_method_left_as_forwards_by_hand_do(name, model):
    method = methods.get(name, **SMALL.get(name, {}))

    def by_hand():
        output = model(input_ids=IDS, use_cache=True)
        cache, tokens = cache_in(output), [output.logits[:, -1:].argmax(-1)]
        lengths = [layer.keys.shape[2] for layer in cache.layers]
        for _ in range(4):
            logits = model(input_ids=tokens[-1], **cache_argument(model, cache), use_cache=True).logits
            tokens.append(logits[:, -1:].argmax(-1))
        return torch.cat(tokens, dim=1), lengths

    (expected, lengths), trace = inside(model, method, by_hand, scorers.recency())
    generated, _ = inside(
        model, method, lambda: model.generate(IDS, max_new_tokens=5, min_new_tokens=5, do_sample=False),
        scorers.recency(),
    )  # fmt: skip
    plain = model.generate(IDS, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert torch.equal(generated[:, IDS.shape[1] :], expected)
    assert sum(lengths) < 8 * 300, "something is shorter"
    if name not in CACHE_ONLY:
        assert trace.compression_ratio > 1 or name == "earlier-scheme"
    assert torch.equal(plain, model.generate(IDS, max_new_tokens=5, min_new_tokens=5, do_sample=False))


@pytest.mark.parametrize("name", methods.names())
def test_a_second_turn_at_once_equals_one_token_at_a_time(name, model):
    method = methods.get(name, **SMALL.get(name, {}))
    more = IDS[:, 40:45]

    def turns():
        cache = cache_in(model(input_ids=IDS, use_cache=True))
        at_once = model(input_ids=more, **cache_argument(model, cache)).logits
        cache, singles = cache_in(model(input_ids=IDS, use_cache=True)), []
        for column in range(5):
            singles.append(model(input_ids=more[:, column : column + 1], **cache_argument(model, cache)).logits)
        return at_once, torch.cat(singles, dim=1)

    (at_once, singles), _ = inside(model, method, turns, scorers.recency())
    torch.testing.assert_close(at_once, singles, rtol=0, atol=1e-9)


@pytest.mark.parametrize("speedup", [1.3, 1.6])
@pytest.mark.parametrize("name", [name for name in methods.names() if name not in (*CACHE_ONLY, "sdtp-low")])
def test_every_method_computes_the_flops_that_a_common_speedup_allows(name, speedup, model):
    small = {**SMALL.get(name, {}), **({"preset": "keep09"} if name in ("sdtp", "earlier-scheme") else {})}
    method = methods.get(name, **small).at_speedup(speedup)
    shape = ModelShape.from_model(model)
    _, trace = inside(model, method, lambda: model(input_ids=IDS, use_cache=True), scorers.recency())
    full = budget.prefill_flops(shape, [300] * 8)
    if name == "asl":
        computed = budget.prefill_flops(shape, trace.tokens_per_layer)
    else:
        passes = method.passes(method.budget_for(model).for_prompt(300), 8, 300)
        assert trace.tokens_per_layer == [sum(counts) for counts in zip(*passes, strict=True)]
        computed = method.prefill_flops(shape, method.budget_for(model).for_prompt(300), 300)
    assert speedup <= full / computed * 1.0000001 and full / computed < speedup * 1.06


@pytest.mark.parametrize("name", [name for name in methods.names() if name not in (*CACHE_ONLY, "sdtp-low")])
def test_a_methods_score_follows_the_speedup_of_its_budget_wherever_it_was_made(name, model):
    method, call = methods.get(name, **SMALL.get(name, {})), lambda: model(input_ids=IDS, use_cache=True)
    scorer = method.scorer_for(model) or scorers.recency()  # of the method with its paper's own budget
    kept = {}
    for speedup in (1.3, 1.6):
        with torch.no_grad(), token_pruning(model, method.at_speedup(speedup), scorer) as trace:
            call()
        _, expected = inside(model, method.at_speedup(speedup), call, scorers.recency())
        assert trace.tokens_per_layer == expected.tokens_per_layer
        for layer, positions in expected.kept_positions.items():
            assert torch.equal(trace.kept_positions[layer], positions), layer
        kept[speedup] = sum(trace.tokens_per_layer)
    assert kept[1.6] < kept[1.3]


@pytest.mark.parametrize("name", ["uniprefill", "specprefill"])
def test_a_methods_score_ranks_under_a_budget_that_is_not_its_own(name, model):
    config = PruningConfig((4,), 0.5, sink_tokens=0, local_ratio=0.0, min_local_tokens=1)
    seen = []
    scorer = methods.get(name, **SMALL[name]).scorer_for(model)
    for given in (scorer, scorer.at(2.0, model)):
        with torch.no_grad(), token_pruning(model, config, given) as trace:
            model(input_ids=IDS, use_cache=True)
        seen.append((trace.scores[4], trace.kept_positions[4]))
    (decided, kept), (ranked, expected) = seen
    assert torch.equal(kept, expected) and torch.equal(decided, ranked) and len(ranked.unique()) > 2


def test_asl_says_how_far_it_can_go_and_gives_other_budgets_no_order(model):
    with pytest.raises(ValueError, match=r"speedup=9: asl prefills 300 tokens at most \d\.\d\dx .*before layer 2: ask"):
        methods.get("asl").at_speedup(9.0).budget_for(model).for_prompt(300)
    with (
        pytest.raises(ValueError, match="scorer=asl decides where to cut .*the method as the budget"),
        token_pruning(model, "1.5x", "asl"),
    ):
        pass


def test_a_speedup_that_cannot_be_had_is_refused_with_the_highest():
    for name in CACHE_ONLY:
        with pytest.raises(ValueError, match=f"{name} shortens the cache only"):
            methods.get(name).at_speedup(2.0)
    with pytest.raises(ValueError, match="speedup=0.5 is not a speed-up"):
        methods.get("fastkv").at_speedup(0.5)


def test_fastkv_says_how_far_it_can_go(model):
    with pytest.raises(ValueError, match=r"speedup=4: fastkv prefills 300 tokens at most 1\.\d\dx .*layers=\[4\]"):
        methods.get("fastkv").at_speedup(4.0).budget_for(model).for_prompt(300)


@pytest.mark.parametrize("name", ["lazyllm", "fastkv", "claa", "sliminfer", "pyramidinfer", "snapkv", "h2o"])
def test_rows_of_a_padded_batch_keep_what_each_keeps_alone(name, model):
    method = methods.get(name, **SMALL.get(name, {}))
    lengths, ids = (220, 300), IDS.expand(2, -1).clone()
    mask = torch.ones_like(ids)
    mask[0, :80] = 0
    both, together = inside(
        model, method, lambda: model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    )
    for row, length in enumerate(lengths):
        _, alone = inside(model, method, lambda length=length: model(input_ids=IDS[:, -length:], use_cache=True))
        for layer, kept in together.kept_positions.items():
            assert kept[row][kept[row] >= 0].tolist() == alone.kept_positions[layer][0].tolist()
    assert both.shape == (2, 303)


def test_leaving_the_with_leaves_the_model_and_the_session_as_they_were(model):
    method = methods.get("gemfilter", tokens=60)
    with pytest.raises(RuntimeError, match="on the way"):
        inside(model, method, lambda: (_ for _ in ()).throw(RuntimeError("on the way")))
    for modules in (model.modules(), model.model.modules()):
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules)
    kv = KVBudget(lambda *_: 5, scorers.recency())
    with pytest.raises(ValueError, match="kv_budget.* works inside a `with token_pruning"), kv_budget(model, kv):
        pass


def test_the_filter_pass_stops_before_its_layer(model):
    ran = []
    hooks = [layer.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(model.model.layers)]
    inside(model, methods.get("gemfilter", tokens=60), lambda: model(input_ids=IDS))
    for hook in hooks:
        hook.remove()
    assert ran == [0, 1, 2, *range(8)]


def test_a_prompt_that_a_filter_leaves_whole_is_the_plain_models(model):
    with pytest.warns(
        UserWarning, match=r"the prompt of 300 tokens is no longer than what is kept \(keep_tokens=1024\)"
    ):
        output, trace = inside(model, methods.get("gemfilter"), lambda: model(input_ids=IDS).logits)
    assert torch.equal(output, model(input_ids=IDS).logits)
    assert trace.kept_positions[3].shape == (1, 300)
    assert "no longer than what is kept" in trace.not_pruned


def test_renumbering_and_a_kv_budget_are_refused_where_they_cannot_be_right(tiny_model, model):
    config = PruningConfig((2,), 0.5)
    bloom = tiny_model("bloom")
    with (
        token_pruning(bloom, config, scorers.recency()),
        pytest.raises(PruningNotSupported, match="one rotary table"),
        two_passes(bloom, TwoPasses()),
    ):
        pass
    compact = config.replace(positions="compact")
    kv = KVBudget(lambda *_: 5, scorers.recency())
    with (
        token_pruning(model, compact, scorers.recency()),
        pytest.raises(PruningNotSupported, match="renumbered"),
        kv_budget(model, kv),
    ):
        pass
    with pytest.raises(PruningNotSupported, match="batch of 2"):
        inside(model, methods.get("gemfilter", tokens=60), lambda: model(input_ids=IDS.expand(2, -1)))


def test_a_kv_budget_by_token_is_the_unpruned_model_with_the_other_keys_masked(model):
    scorer, more = scorers.attention(8), IDS[:, 40:43]
    kv = KVBudget(lambda held, layer, prompt: held // (2 + layer % 2), scorer, sink_tokens=4, last_tokens=8)
    with torch.no_grad(), token_pruning(model, PruningConfig((1,), 1.0), scorer), kv_budget(model, kv):
        cache = cache_in(model(input_ids=IDS, use_cache=True))
        kept = [columns[0].tolist() for columns in cache.record.kept]
        found = model(input_ids=more, **cache_argument(model, cache)).logits
    assert [len(columns) for columns in kept] == [150, 100] * 4 and cache.get_seq_length() == 303
    with torch.no_grad():
        cache = cache_in(model(input_ids=IDS, use_cache=True))
        for layer, columns in zip(cache.layers, kept, strict=True):
            layer.keys, layer.values = layer.keys[:, :, columns], layer.values[:, :, columns]
        # by hand: each layer's own keys, all visible, and the new tokens causal among themselves
        hidden, tables = model.model.embed_tokens(more), None
        positions = torch.arange(300, 303)[None]
        tables = model.model.rotary_emb(hidden, position_ids=positions)
        for index, layer in enumerate(model.model.layers):
            seen = torch.zeros(1, 1, 3, len(kept[index]), dtype=torch.bool)
            later = torch.ones(1, 1, 3, 3, dtype=torch.bool).triu(1)
            hidden = layer(
                hidden, attention_mask=~torch.cat([seen, later], -1), position_embeddings=tables,
                position_ids=positions, **cache_argument(layer, cache), use_cache=True,
            )  # fmt: skip
        expected = model.lm_head(model.model.norm(hidden))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_votes_and_blocks_are_what_is_worked_by_hand():
    paid = torch.tensor([[[[0.1, 0.2, 0.3, 0.4, 0.0], [0.3, 0.0, 0.3, 0.2, 0.2]]]])
    assert votes(paid).tolist() == [[pytest.approx([0.4, 0.2, 0.6, 0.0, 0.0])]]
    assert votes(paid, 3).tolist() == [[pytest.approx([0.2, 0.4, 0.8 / 3, 0.0, 0.0])]]
    values, valid = torch.tensor([[9.0, 1.0, 3.0, 5.0, 7.0, 8.0]]), torch.ones(1, 6, dtype=torch.bool)
    valid[0, 0] = False
    assert block_means(values, valid, 2)[0, 1:].tolist() == [2.0, 2.0, 6.0, 6.0, 8.0]
    means = torch.tensor([[2.0, 2.0, 6.0, 6.0, 8.0]])
    assert best_blocks(means, 2, count=1)[0].tolist() == [False] * 4 + [True]
    assert best_blocks(means, 2, mass=0.8)[0].tolist() == [False, False, True, True, True]


def test_a_trace_counts_both_passes_and_the_keys_that_a_budget_left(model):
    shape = ModelShape.from_model(model)
    full = budget.prefill_flops(shape, [300] * 8)
    _, trace = inside(model, methods.get("gemfilter", tokens=60), lambda: model(input_ids=IDS, use_cache=True))
    flops = budget.prefill_flops(shape, [60] * 8)
    flops += budget.prefill_flops(shape, [300] * 3 + [0] * 5, logits_positions=0)
    assert "prompt: 300 tokens, last layer: 60 tokens (20%)" in str(trace)
    assert f"{full / flops:.2f}x fewer" in str(trace) and "KV cache: -80%" in str(trace)
    _, trace = inside(model, methods.get("fastkv"), lambda: model(input_ids=IDS, use_cache=True))
    assert "last layer: 60 tokens" in str(trace) and "KV cache: -90%, scorer: fastkv" in str(trace)
    assert trace.keys_per_layer == [30] * 8


def test_two_passes_that_cost_more_than_one_are_said_to_cost_more(model):
    """The trace read ``prefill FLOPs: --37% (0.73x fewer)``."""
    shape = ModelShape.from_model(model)
    _, trace = inside(model, methods.get("gemfilter", tokens=290), lambda: model(input_ids=IDS, use_cache=True))
    flops = budget.prefill_flops(shape, [290] * 8)
    flops += budget.prefill_flops(shape, [300] * 3 + [0] * 5, logits_positions=0)
    share = flops / budget.prefill_flops(shape, [300] * 8)
    assert share > 1.2
    assert f"prefill FLOPs: +{share - 1:.0%} ({1 / share:.2f}x: more than the unpruned model's)" in str(trace)


@pytest.mark.parametrize("name", CACHE_ONLY)
def test_a_method_of_the_cache_alone_says_in_the_trace_what_it_does(name, model):
    """The trace of snapkv and h2o read ``scorer: recency``."""
    _, trace = inside(model, methods.get(name, **SMALL.get(name, {})), lambda: model(input_ids=IDS, use_cache=True))
    kept = {"snapkv": 90, "h2o": 60}[name]
    assert trace.summary() == {
        "prompt": "300 tokens", "last layer": "300 tokens (100%)", "1/tau": "1.00", "prefill FLOPs": "0% (1.00x fewer)",
        "KV cache": f"-{1 - kept / 300:.0%}", "scorer": name, "cut": "the KV cache alone, after a whole prefill",
    }  # fmt: skip
    _, pruned = inside(model, methods.get("fastkv"), lambda: model(input_ids=IDS, use_cache=True))
    assert "cut" not in pruned.summary() and pruned.keys_per_layer
