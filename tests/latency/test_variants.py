"""The ways to a first token: each computes what it says, and decodes from the cache that it filled."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sdtp_lib import budget, methods, scorers
from sdtp_lib.architectures.caches import cache_argument, cache_in
from sdtp_lib.config import PruningConfig
from sdtp_lib.evaluation.divergence import logits_along
from sdtp_lib.latency import variants as latency_variants
from sdtp_lib.latency.generation import plain_prefill, plain_step, prefill_and_decode
from sdtp_lib.latency.run import describe, row_fields
from sdtp_lib.methods.variant import Variant

STAGES = PruningConfig((2, 4), 0.7)
TOKENS = 300


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(dtype=torch.float64, attn_implementation="eager")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 128, (1, TOKENS), generator=torch.Generator().manual_seed(0))


VARIANTS = {
    "unpruned": Variant("unpruned"),
    "sdtp": Variant("sdtp", STAGES, scorers.recency()),
    "propagation": Variant("propagation", methods.get("fastkv", keep=0.5, kv=None)),
    "filter": Variant("filter", methods.get("gemfilter", tokens=150, filter_depth=0.5)),
    "kv": Variant("kv", methods.get("snapkv", tokens=120)),
    "earlier": Variant("earlier", methods.get("earlier-scheme", preset="keep07"), scorers.recency()),
}


LENGTHS = {
    "unpruned": [300] * 6,
    "sdtp": [300, 300, 210, 210, 147, 147],
    "propagation": [300, 300, 300, 150, 150, 150],
    "filter": [150] * 6,
    "kv": [120] * 6,
    "earlier": [210] * 6,
}


@pytest.mark.parametrize("text", ["gemfilter@1.5x", "fastkv@1.5x", "snapkv", "1.5x"])
def test_a_budget_that_names_a_method_is_counted_as_the_method(text, model):
    scorer = None if text[0].isalpha() else scorers.recency()
    by_name, itself = Variant("a", text, scorer), Variant("a", text if scorer else methods.named(text), scorer)
    assert by_name == itself and by_name.passes(model, TOKENS) == itself.passes(model, TOKENS)
    assert len(by_name.passes(model, TOKENS)) == 1 + text.startswith("gemfilter")
    with pytest.raises(ValueError, match="'gemfiltre' is unknown"):
        Variant("b", "gemfiltre")


@pytest.mark.parametrize("nothing", [0, 0.0, False, [], {}])
def test_a_budget_that_is_none_is_refused_and_never_the_comparisons_own(nothing, model):
    """``Variant("a", 0.0)`` was measured at the budget that the comparison set, under the name of its own."""
    own = Variant("a", nothing, scorers.recency()).at(model, "2x", TOKENS)
    assert own.budget == nothing
    with pytest.raises(ValueError, match="keep_ratio=0|budget="), own.applied(model):
        pass


@pytest.mark.parametrize("cost", ["fastkv@1.5x", "fastkv", methods.get("fastkv")])
@pytest.mark.parametrize("variant", [Variant("score", None, scorers.recency()), Variant("method", "gemfilter")])
def test_what_a_comparison_costs_is_no_method(variant, cost, model):
    """A score became that method, under the score's name."""
    with pytest.raises(ValueError, match=r"^cost=.* is a method: give what it is to cost"):
        variant.at(model, cost, TOKENS)


def test_a_method_that_cannot_be_so_fast_is_left_out_and_that_is_said(model):
    """``bench --method fastkv@9x`` printed a table without it and no word."""
    with pytest.warns(UserWarning, match=r"fastkv@9x is left out at 300 tokens: speedup=9: fastkv prefills .* at most"):
        found = latency_variants.named(model, ["fastkv@1.2x", "fastkv@9x"], TOKENS, scorers.recency())
    assert [each.name for each in found] == ["fastkv@1.2x"]


@pytest.mark.parametrize("name", LENGTHS)
def test_cache_lengths_are_the_promised_ones_and_read_from_the_cache(name, model, ids):
    fields = row_fields(VARIANTS[name], model, ids, 4)
    assert fields["kv_tokens_per_layer"] == LENGTHS[name]
    assert fields["kv_bytes"] == budget.kv_bytes(budget.ModelShape.from_model(model), LENGTHS[name], 8)
    assert fields["new_tokens"] == 4


@pytest.mark.parametrize("name", [name for name in LENGTHS if name != "kv"])
def test_the_counted_flops_are_the_executed_ones(name, model, ids):
    variant = VARIANTS[name]
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, variant.applied(model):
        plain_prefill(model, ids)
    shape = budget.ModelShape.from_model(model)
    # Eager attention computes the full square.
    expected = sum(budget.prefill_flops(shape, counts, causal=False) for counts in variant.passes(model, TOKENS))
    scoring = 0.06 if name in ("propagation", "filter") else 0.0
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01 + scoring)
    assert describe(variant, model, TOKENS)["tflops"] * 1e12 < expected


def test_the_cache_methods_leave_the_prefill_whole_and_shorten_what_decode_reads(model, ids):
    with torch.no_grad():
        plain = model(ids, logits_to_keep=1, use_cache=True)
    token = plain.logits[:, -1].argmax(-1, keepdim=True)
    with torch.no_grad(), VARIANTS["kv"].applied(model):
        logits, cache = plain_prefill(model, ids)
        assert torch.equal(logits, plain.logits)
        one = plain_step(model, token, cache)[0]
    full = model(token, **cache_argument(model, cache_in(plain))).logits
    assert 1e-6 < (one - full).abs().max() < 1.0


@pytest.mark.parametrize("name", LENGTHS)
def test_a_continuation_in_one_forward_equals_one_token_at_a_time(name, model, ids):
    more = torch.randint(3, 128, (1, 6), generator=torch.Generator().manual_seed(1))
    with VARIANTS[name].applied(model):
        at_once = logits_along(model, ids[0].tolist(), more[0].tolist())
    with torch.no_grad(), VARIANTS[name].applied(model):
        logits, cache = plain_prefill(model, ids)
        singles = [logits]
        for i in range(5):
            logits, cache = plain_step(model, more[:, i : i + 1], cache)
            singles.append(logits)
    assert torch.allclose(at_once, torch.cat(singles, dim=1)[0].float(), atol=1e-6)


def test_keep_ratio_one_is_the_plain_model(model, ids):
    plain = prefill_and_decode(model, ids, 6).token_ids
    with Variant("keep1.0", STAGES.replace(keep_ratio=1.0), scorers.recency()).applied(model):
        assert torch.equal(prefill_and_decode(model, ids, 6).token_ids, plain)
