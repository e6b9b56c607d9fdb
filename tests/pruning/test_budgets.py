"""Budgets other than one ratio: a wanted speed-up, tokens per stage, a share of the scores; and protected tokens."""

from __future__ import annotations

import warnings

import pytest
import torch

from sdtp_lib import PruningConfig, PruningNotSupported, budget, scorers, token_pruning
from sdtp_lib.model_shape import ModelShape
from sdtp_lib.pruning.selection import count_for_mass

CONFIG = PruningConfig(layers=(1, 3, 4), keep_ratio=0.6, min_local_tokens=4)
PROMPT = torch.randint(3, 128, (1, 200), generator=torch.Generator().manual_seed(1))


def _trace(model, wanted, scorer=None, ids=PROMPT, **options):
    arguments = options.pop("arguments", {})
    with torch.no_grad(), token_pruning(model, wanted, scorer or scorers.random(3), **options) as trace:
        model(input_ids=ids, **arguments)
    return trace


@pytest.mark.parametrize("tokens", [512, 1024, 2048, 4096, 8192])
def test_a_wanted_speedup_is_reached_within_two_percent(tokens):
    shape = ModelShape.named("SmolLM2-135M-Instruct")
    wanted = budget.SpeedupBudget(PruningConfig.preset("keep09", shape.num_layers), 2.0, shape)
    assert 2.0 <= budget.speedup_limit(shape, wanted.for_prompt(tokens), tokens, pruner_width=0) <= 2.04
    assert wanted.for_prompt(tokens) is wanted.for_prompt(tokens), "each length is solved once"


def test_each_row_of_a_batch_gets_the_speedup_for_its_own_length(tiny_model):
    model = tiny_model()
    wanted = budget.SpeedupBudget(CONFIG, 1.5, ModelShape.from_model(model))
    mask = torch.ones(2, 200, dtype=torch.long)
    mask[0, :120] = 0
    trace = _trace(model, wanted, ids=PROMPT.expand(2, -1), arguments={"attention_mask": mask})
    for row, tokens in enumerate((80, 200)):
        counts = budget.tokens_per_layer(wanted.for_prompt(tokens), 6, tokens)
        assert trace.tokens_per_row[:, row].tolist() == counts


def test_a_speedup_that_protected_tokens_forbid_names_the_highest(tiny_model):
    model = tiny_model()
    wanted = budget.SpeedupBudget(CONFIG, 50.0, ModelShape.from_model(model))
    with pytest.raises(ValueError, match=r"budget='50x': a prompt of 200 tokens .* at most 4.89x as fast"):
        _trace(model, wanted)
    with pytest.warns(UserWarning, match="8 tokens is too short"):
        assert _trace(model, wanted, ids=PROMPT[:, :8]).tokens_per_layer == [8] * 6


def test_a_budget_in_tokens_keeps_so_many_at_each_stage(tiny_model):
    trace = _trace(tiny_model(), CONFIG.replace(keep_tokens=(150, 90, 3)))
    assert trace.tokens_per_layer == [200, 150, 150, 90, 13, 13], "4 sinks and a tenth of 90 always stay"


def test_an_adaptive_budget_keeps_the_best_tokens_until_they_hold_the_mass(tiny_model):
    scores = torch.ones(1, 200)
    scores[0, 50:60] = 100.0  # 1,000 of 1,190
    config = PruningConfig(layers=(2,), keep_mass=0.8, sink_tokens=2, min_local_tokens=3, local_ratio=0.0)
    trace = _trace(tiny_model(), config, scorers.given({2: scores}))
    assert trace.kept_positions[2][0].tolist() == [0, 1, *range(55, 60), 197, 198, 199]
    assert trace.tokens_per_layer == [200, 200, 10, 10, 10, 10]
    with pytest.raises(PruningNotSupported, match=r"keep_mass=0.8 with a batch of 2"):
        _trace(tiny_model(), config, ids=PROMPT.expand(2, -1))


def test_mass_is_counted_as_worked_by_hand():
    assert count_for_mass(torch.tensor([0.1, 0.5, 0.1, 0.3]), 0.75) == 2
    assert count_for_mass(torch.tensor([0.25, 0.25, 0.25, 0.25]), 0.75) == 3
    assert count_for_mass(torch.tensor([0.0, 1.0]), 1.0) == 1


def test_protected_tokens_stay_at_every_stage_and_count_in_the_budget(tiny_model):
    protect = torch.zeros(1, 200, dtype=torch.bool)
    protect[0, 30:130] = True
    trace = _trace(tiny_model(), CONFIG, protect=protect)
    for kept in trace.kept_positions.values():
        assert set(range(30, 130)) <= set(kept[0].tolist())
    # 120 of 200 are wanted before layer 1, and 124 must stay: 4 sinks, the 100, the last 20; then the last 13, and 12
    assert trace.tokens_per_layer == [200, 124, 124, 117, 116, 116]


def test_protected_tokens_of_rows_of_one_length_may_differ(tiny_model):
    protect = torch.zeros(2, 200, dtype=torch.bool)
    protect[1, 30:190] = True
    model, ids = tiny_model(dtype=torch.float64), PROMPT.expand(2, -1).contiguous()
    together = _trace(model, CONFIG, protect=protect, ids=ids)
    alone = [_trace(model, CONFIG, protect=protect[row : row + 1], ids=ids[:1]) for row in range(2)]
    for row in range(2):
        assert together.tokens_per_row[:, row].tolist() == alone[row].tokens_per_layer
        for layer in CONFIG.layers:
            kept = together.kept_positions[layer][row]
            assert torch.equal(kept[kept >= 0], alone[row].kept_positions[layer][0])
    with torch.no_grad(), token_pruning(model, CONFIG, scorers.random(3), protect=protect):
        both = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    for row in range(2):
        with torch.no_grad(), token_pruning(model, CONFIG, scorers.random(3), protect=protect[row : row + 1]):
            one = model.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=5, do_sample=False)
        assert torch.equal(both[row], one[0])


def test_protection_of_another_shape_or_kind_is_refused_before_any_compute(tiny_model):
    with pytest.raises(ValueError, match=r"protect=torch.int64 \(1, 200\).*booleans"):
        _trace(tiny_model(), CONFIG, protect=torch.ones(1, 200, dtype=torch.long))
    with pytest.raises(ValueError, match=r"protect has shape \(1, 7\).*1 row\(s\) of 200 tokens"):
        _trace(tiny_model(), CONFIG, protect=torch.ones(1, 7, dtype=torch.bool))


def test_a_prompt_below_the_threshold_is_left_whole_and_only_the_trace_says_so(tiny_model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace = _trace(tiny_model(), CONFIG.replace(min_prompt_tokens=300))
    assert trace.tokens_per_layer == [200] * 6
    assert "200 tokens is shorter than min_prompt_tokens=300" in trace.not_pruned
    assert _trace(tiny_model(), CONFIG.replace(min_prompt_tokens=200)).tokens_per_layer[-1] < 200


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"keep_tokens": 0}, "keep_tokens=0 keeps no token"),
        ({"keep_tokens": (5, 4)}, r"keep_tokens=\[5, 4\] has 2 entries for 3 layers"),
        ({"keep_mass": 1.5}, r"keep_mass=1.5 is outside \(0, 1\]"),
        ({"keep_mass": 0.5, "keep_tokens": 5}, "two budgets"),
        ({"min_prompt_tokens": -1}, "min_prompt_tokens=-1 is negative"),
        ({"prune": "always"}, "prune='always' is unknown: choose one of first, every"),
    ],
)
def test_budget_fields_out_of_range_are_refused_by_name(changes, match):
    with pytest.raises(ValueError, match=match):
        CONFIG.replace(**changes)
