"""The ways to a first token: each computes what it says, and decodes from the cache that it filled."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sdtp_lib import budget, scorers
from sdtp_lib import methods as catalogue
from sdtp_lib.architectures.caches import cache_argument, cache_in
from sdtp_lib.config import PruningConfig
from sdtp_lib.latency import methods

STAGES = PruningConfig((2, 4), 0.7)
TOKENS = 300


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(dtype=torch.float64, attn_implementation="eager")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 128, (1, TOKENS), generator=torch.Generator().manual_seed(0))


def all_methods(model):
    recency = scorers.recency()
    entries = {
        "propagation": catalogue.get("fastkv", keep=0.5, kv=None),
        "filter": catalogue.get("gemfilter", tokens=150, filter_depth=0.5),
        "kv": catalogue.get("snapkv", tokens=120),
        "earlier": catalogue.get("earlier-scheme", preset="keep07"),
    }
    return {
        "unpruned": methods.unpruned(model),
        "sdtp": methods.sdtp(model, STAGES, recency, "sdtp"),
        **{name: methods.published(model, entry, TOKENS, name, recency) for name, entry in entries.items()},
    }


LENGTHS = {
    "unpruned": [300] * 6,
    "sdtp": [300, 300, 210, 210, 147, 147],
    "propagation": [300, 300, 300, 150, 150, 150],
    "filter": [150] * 6,
    "kv": [120] * 6,
    "earlier": [210] * 6,
}


@pytest.mark.parametrize("name", LENGTHS)
def test_cache_lengths_are_the_promised_ones_and_read_from_the_cache(name, model, ids):
    fields = all_methods(model)[name].row_fields(model, ids, 4)
    assert fields["kv_tokens_per_layer"] == LENGTHS[name]
    assert fields["kv_bytes"] == budget.kv_bytes(budget.ModelShape.from_model(model), LENGTHS[name], 8)
    assert fields["new_tokens"] == 4


@pytest.mark.parametrize("name", [name for name in LENGTHS if name != "kv"])
def test_the_counted_flops_are_the_executed_ones(name, model, ids):
    method = all_methods(model)[name]
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, method.open(model) as session:
        session.prefill(ids)
    shape = budget.ModelShape.from_model(model)
    # Eager attention computes the full square.
    expected = sum(budget.prefill_flops(shape, counts, causal=False) for counts in method.computed(TOKENS))
    scoring = 0.06 if name in ("propagation", "filter") else 0.0
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01 + scoring)
    assert method.tflops(shape, TOKENS) * 1e12 < expected


def test_the_cache_methods_leave_the_prefill_whole_and_shorten_what_decode_reads(model, ids):
    method = all_methods(model)["kv"]
    with torch.no_grad():
        plain = model(ids, logits_to_keep=1, use_cache=True)
    token = plain.logits[:, -1].argmax(-1, keepdim=True)
    with torch.no_grad(), method.open(model) as session:
        logits, cache = session.prefill(ids)
        assert torch.equal(logits, plain.logits)
        one = session.step(token, cache)[0]
    full = model(token, **cache_argument(model, cache_in(plain))).logits
    assert 1e-6 < (one - full).abs().max() < 1.0


@pytest.mark.parametrize("name", LENGTHS)
def test_a_continuation_in_one_forward_equals_one_token_at_a_time(name, model, ids):
    more = torch.randint(3, 128, (1, 5), generator=torch.Generator().manual_seed(1))
    method = all_methods(model)[name]
    with torch.no_grad(), method.open(model) as session:
        at_once = session.step(more, session.prefill(ids)[1])[0]
    with torch.no_grad(), method.open(model) as session:
        cache, singles = session.prefill(ids)[1], []
        for i in range(5):
            logits, cache = session.step(more[:, i : i + 1], cache)
            singles.append(logits)
    assert torch.allclose(at_once, torch.cat(singles, dim=1), atol=1e-6)


def test_keep_ratio_one_is_the_plain_model(model, ids):
    whole = methods.sdtp(model, STAGES.replace(keep_ratio=1.0), scorers.recency(), "keep1.0")
    assert torch.equal(
        whole.generate(model, ids, 6).token_ids, methods.unpruned(model).generate(model, ids, 6).token_ids
    )
