"""Counts worked by hand, and the full count against torch's own counter."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from sdtp_lib import budget
from sdtp_lib.budget import ModelShape
from sdtp_lib.config import PruningConfig

PLAIN = PruningConfig(layers=(1,), keep_ratio=0.9)
# D = 8, two heads of 4, one KV head, F = 16, V = 10, two layers: small enough to count on paper.
SMALL = ModelShape(2, 8, 2, 1, 4, 16, 10)


@pytest.mark.parametrize(
    ("tokens", "keep_ratio", "expected"),
    [
        (1000, 0.9, 900),
        (1000, 0.7, 700),
        (10, 0.7, 10),  # 4 + 16 protected: a short prompt is left whole
        (21, 0.1, 20),
        (1000, 0.01, 104),  # 4 sinks + a tenth
        (1001, 0.01, 105),  # the tenth is rounded up
        (10_000, 0.7, 7000),  # 0.7 * 10_000 is 6999.99.. in binary
        (1, 0.5, 1),
        (0, 0.5, 0),
        (12345, 1.0, 12345),
    ],
)
def test_keep_count_gives_the_values_worked_by_hand(tokens, keep_ratio, expected):
    assert budget.keep_count(tokens, 1, PLAIN.replace(layers=(1,), keep_ratio=keep_ratio)) == expected


def test_overlapping_sinks_and_local_tokens_are_protected_once():
    assert budget.protected_count(12, PLAIN) == 12
    assert budget.protected_count(500, PLAIN) == 54
    assert budget.protected_count(500, PLAIN.replace(sink_tokens=0, local_ratio=0.0, min_local_tokens=0)) == 0


def test_tokens_per_layer_drops_before_the_named_layers():
    config = PruningConfig(layers=(1, 3), keep_ratio=(0.5, 0.8))
    assert budget.tokens_per_layer(config, 5, 1000) == [1000, 500, 500, 400, 400]
    assert budget.tokens_per_layer(None, 3, 7) == [7, 7, 7]
    assert budget.compression_ratio([1000, 500, 500, 400, 400]) == pytest.approx(5000 / 2800)


def test_tokens_per_layer_refuses_a_layer_that_the_model_does_not_have():
    with pytest.raises(ValueError, match="layers"):
        budget.tokens_per_layer(PruningConfig(layers=(5,)), 5, 100)


def test_eight_stages_at_0_7_leave_a_twentieth():
    config = PruningConfig.preset("keep07", num_layers=28)
    counts = budget.tokens_per_layer(config, 28, 100_000)
    assert counts[-1] / counts[0] == pytest.approx(0.7**8, rel=1e-3)
    with pytest.raises(ValueError, match="27"):
        budget.prefill_flops(SMALL, counts[:27])
    with pytest.raises(ValueError, match="28 entries for 2 layers"):
        budget.kv_bytes(SMALL, counts, 2)


def test_prefill_flops_are_the_ones_counted_on_paper():
    # A layer's weights: q 8*8, k 8*4, v 8*4, o 8*8, feed-forward 3*8*16 = 576; 10 + 5 tokens.
    linear = 2 * 576 * (10 + 5)
    squares = 100 + 25
    head = 2 * 10 * 8
    assert budget.prefill_flops(SMALL, [10, 5]) == linear + 2 * squares * 8 + head
    assert budget.prefill_flops(SMALL, [10, 5], causal=False) == linear + 4 * squares * 8 + head
    assert budget.prefill_flops(SMALL, [10, 5], logits_positions=10) == linear + 2 * squares * 8 + 10 * head
    assert budget.prefill_flops(SMALL, [10, 5], pruner_flops=7) == linear + 2 * squares * 8 + head + 7


def test_kv_bytes_are_the_ones_counted_on_paper():
    assert budget.kv_bytes(SMALL, [10, 5], 2) == 2 * 4 * 2 * 15


def test_pruner_flops_count_the_tokens_that_reach_the_stage():
    assert budget.pruner_flops(8, (1,), [10, 5]) == 2 * 10 * (8 * 2 + 2)
    assert budget.pruner_flops(8, (1,), [10, 5], width=3) == 2 * 10 * (8 * 3 + 3)


def test_the_pruners_cost_under_one_percent_of_the_prefill():
    shape = ModelShape.named("SmolLM2-135M-Instruct")
    config = PruningConfig.preset("keep09", 30)
    counts = budget.tokens_per_layer(config, 30, 2048)
    assert budget.pruner_flops(576, config.layers, counts) < 0.01 * budget.prefill_flops(shape, counts)


@pytest.mark.parametrize("target", [{"speedup": 1.5}, {"final_tokens": 900}, {"mean_tokens": 1500}])
def test_find_keep_ratio_is_the_largest_that_reaches_its_target(target):
    shape, config = ModelShape.named("SmolLM2-135M-Instruct"), PruningConfig.preset("keep09", 30)
    ratio = budget.find_keep_ratio(shape, config, 2048, **target)

    def met(candidate):
        counts = budget.tokens_per_layer(config.replace(keep_ratio=candidate), 30, 2048)
        if "final_tokens" in target:
            return counts[-1] <= 900
        if "mean_tokens" in target:
            return sum(counts) / 30 <= 1500
        return budget.speedup_limit(shape, config.replace(keep_ratio=candidate), 2048) >= 1.5

    assert met(ratio)
    assert not met(ratio + 1e-3)


def test_find_keep_ratio_refuses_what_the_protected_tokens_forbid_and_two_targets():
    shape, config = ModelShape.named("SmolLM2-135M-Instruct"), PruningConfig.preset("keep09", 30)
    with pytest.raises(ValueError, match="final_tokens=3 cannot be reached"):
        budget.find_keep_ratio(shape, config, 2048, final_tokens=3)
    with pytest.raises(ValueError, match="exactly one"):
        budget.find_keep_ratio(shape, config, 2048, final_tokens=3, speedup=2.0)
    assert budget.find_keep_ratio(shape, config, 2048, final_tokens=2048) == 1.0


def test_causal_pairs_are_those_counted_one_by_one_and_a_window_keeps_its_share():
    triangle = sum(min(i, 16) for i in range(1, 101))  # with the diagonal, half of which the estimate leaves out
    assert budget.causal_pairs(100, 100, 16) == pytest.approx(triangle, rel=0.01)
    assert budget.causal_pairs(100, 100) == budget.causal_pairs(100, 100, 100) == 100**2 / 2
    # Half of the tokens, spread evenly: each sees half as many others inside its window.
    assert budget.causal_pairs(50, 100, 16) == budget.causal_pairs(100, 100, 16) / 4


def test_a_layers_window_shortens_its_causal_attention_and_its_cache():
    full = SMALL.layers[0]
    shape = dataclasses.replace(SMALL, layers=(full, dataclasses.replace(full, window=4)))
    assert budget.prefill_flops(SMALL, [10, 5]) - budget.prefill_flops(shape, [10, 5]) == 32 * (12.5 - 32 / 4)
    assert budget.prefill_flops(shape, [10, 5], causal=False) == budget.prefill_flops(SMALL, [10, 5], causal=False)
    assert budget.kv_bytes(shape, [10, 5], 2) == 2 * 8 * (10 + 3)


def test_the_kept_tokens_of_a_pruned_window_layer_take_the_bytes_that_were_counted(tiny_model):
    torch = pytest.importorskip("torch")
    from sdtp_lib import scorers, token_pruning

    config = PruningConfig(layers=(1, 2), keep_ratio=0.7, local_ratio=0.0, min_local_tokens=2, sink_tokens=1)
    for family in ("mistral", "gemma2", "gpt_oss", "qwen2_moe"):
        model = tiny_model(family, sliding_window=16) if family != "qwen2_moe" else tiny_model(family)
        with torch.no_grad(), token_pruning(model, config, scorers.random(seed=0)) as trace:
            model(torch.arange(3, 43)[None], use_cache=True)
        counted = budget.kv_bytes(ModelShape.from_model(model), trace.tokens_per_layer, 4)
        assert sum(trace.kv_bytes_per_layer) == counted


def test_a_mixture_of_experts_reaches_the_speedup_that_was_asked_for(tiny_model):
    pytest.importorskip("torch")
    shape, config = ModelShape.from_model(tiny_model("mixtral")), PruningConfig(layers=(1, 3), keep_ratio=0.9)
    ratio = budget.find_keep_ratio(shape, config, 2048, speedup=1.5)
    assert budget.speedup_limit(shape, config.replace(keep_ratio=ratio), 2048) == pytest.approx(1.5, rel=0.01)


def test_an_honest_count_of_the_papers_model_is_not_the_papers():
    shape = ModelShape.named("Mistral-7B-Instruct-v0.2")
    honest = budget.prefill_flops(shape, [4096] * 32, causal=False, logits_positions=4096) / 1e12
    assert honest == pytest.approx(67.0, rel=0.01)


def test_an_unknown_dtype_or_size_is_refused_by_name():
    with pytest.raises(ValueError, match="dtype='int3'"):
        SMALL.weight_bytes("int3")
    with pytest.raises(ValueError, match="num_heads=0"):
        ModelShape(2, 8, 0, 1, 4, 16, 10)
    with pytest.raises(ValueError, match="hidden_size=8.5 is not a whole number"):
        ModelShape(2, 8.5, 2, 1, 4, 16, 10)
    with pytest.raises(ValueError, match="layers has 1 entries for num_layers=2"):
        dataclasses.replace(SMALL, layers=SMALL.layers[:1])


def test_budget_needs_no_torch():
    code = "import sys; import sdtp_lib.budget; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_command_line_says_its_options_and_counts_what_is_asked(capsys):
    with pytest.raises(SystemExit, match="0"):
        budget.main(["--help"])
    told = capsys.readouterr().out
    assert all(word in told for word in ("--model", "--prompt-tokens", "default", "Llama-2-7B"))
    with pytest.raises(SystemExit):
        budget.main(["--prompt-tokens", "0"])
    assert "--prompt-tokens 0: give 1 or more" in capsys.readouterr().err
    budget.main(["--model", "SmolLM2-135M-Instruct", "--prompt-tokens", "2048", "--presets", "keep07"])
    (line,) = capsys.readouterr().out.splitlines()[2:]
    shape, config = ModelShape.named("SmolLM2-135M-Instruct"), PruningConfig.preset("keep07", 30)
    assert line.split()[:2] == ["2048", "keep07"]
    assert f"{budget.speedup_limit(shape, config, 2048):.2f}x" in line
    with pytest.raises(SystemExit, match="2"):
        budget.main(["--presets", "keep99"])
    assert "preset='keep99'" in capsys.readouterr().err
