"""The cost model: values worked by hand, and what it must obey."""

from __future__ import annotations

import pytest

from sdtp_lib import budget
from sdtp_lib.config import PruningConfig
from sdtp_lib.latency import cost_model
from sdtp_lib.latency.cost_model import HARDWARE, Hardware
from sdtp_lib.model_shape import ModelShape

MISTRAL = ModelShape.named("Mistral-7B-Instruct-v0.2")
KEEP09 = PruningConfig.preset("keep09", 32)
ROUND = Hardware("round", 1.0, 1.0, 1.0, 1.0, 1.0, asynchronous=False)


def test_prefill_is_the_sum_worked_by_hand():
    shape = ModelShape(1, 8, 2, 1, 4, 16, 10)
    # 1 TFLOP/s and 1 GB/s: matmuls 2 * 100 * 576 FLOPs, attention 2 * 100^2 * 8, elementwise bytes, head bytes.
    widths = 22 * 8 + 11 * (8 + 4) + 4 * 4 + 5 * 16
    expected = 1e-9 * (2 * 100 * 576 + 2 * 100**2 * 8) + 1e-6 * (100 * 4 * widths + 4 * 10 * 8) + 1e-3 * (60 + 10)
    assert cost_model.prefill_ms(shape, ROUND, [100], dtype="float32") == pytest.approx(expected)


def test_a_decode_step_moves_weights_and_cache():
    shape = ModelShape(1, 8, 2, 1, 4, 16, 10)
    moved = 4 * (576 + 80) + 3 * 2 * 4 * 4 * (100 + 1)
    assert cost_model.decode_ms(shape, ROUND, [100], 1, dtype="float32") == pytest.approx(
        1e-6 * moved + 1e-3 * (60 + 30)
    )
    assert cost_model.decode_ms(shape, ROUND, [100], 0) == 0


def test_launches_hide_behind_compute_only_where_work_is_queued():
    slow = Hardware("slow", 1e-3, 1e-3, 1e-3, 1e-3, 1.0, asynchronous=True)
    waiting = Hardware("waiting", 1e-3, 1e-3, 1e-3, 1e-3, 1.0, asynchronous=False)
    shape = ModelShape(1, 8, 2, 1, 4, 16, 10)
    hidden, added = (cost_model.prefill_ms(shape, h, [1000]) for h in (slow, waiting))
    assert added == pytest.approx(hidden + 1e-3 * 70)


def test_pruning_nothing_changes_nothing_but_the_scoring():
    found = cost_model.predict(MISTRAL, HARDWARE["A100-80GB"], KEEP09.replace(keep_ratio=1.0), 4096)
    assert 0.98 < found["prefill_speedup"] < 1.0
    assert found["decode_speedup"] == 1.0 and found["is_prediction"]


@pytest.mark.parametrize("name", HARDWARE)
def test_predicted_speedup_grows_with_the_prompt_and_never_far_passes_the_limit(name):
    found = [cost_model.predict(MISTRAL, HARDWARE[name], KEEP09, 1024 * k) for k in (4, 16, 64, 128)]
    speedups = [values["prefill_speedup"] for values in found]
    assert speedups == sorted(speedups)
    for values in found:
        # Attention runs at a lower rate than matmuls, so saving more of it may gain a little beyond the FLOPs ratio.
        assert values["prefill_speedup"] < 1.05 * values["prefill_limit"]
        assert values["memory_gb_pruned"] < values["memory_gb"]


def test_prediction_and_measurement_meet_in_rows_with_an_error():
    shape = ModelShape.named("SmolLM2-135M-Instruct")
    table = [{"prompt_tokens": 1024, "method": "unpruned", "prefill_ms": 100.0, "decode_ms": None, "new_tokens": 1},
             {"prompt_tokens": 1024, "method": "other", "prefill_ms": 1.0, "new_tokens": 1}]  # fmt: skip
    (row,) = cost_model.against_measured(shape, ROUND, table, {"unpruned": None}, dtype="float32")
    assert row["predicted_ms"] == cost_model.prefill_ms(shape, ROUND, [1024] * 30, dtype="float32")
    assert row["error_percent"] == pytest.approx(row["predicted_ms"] - 100)


def test_a_rate_of_zero_is_refused_by_name():
    with pytest.raises(ValueError, match="bandwidth_gb_s=0"):
        Hardware("broken", 1.0, 1.0, 0, 1.0, 1.0)


def test_measured_rates_are_positive_and_make_a_hardware():
    from sdtp_lib.latency.hardware import measure_hardware
    from sdtp_lib.latency.measure import threads

    shape = ModelShape(num_layers=2, hidden_size=32, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=64,
                       vocab_size=128)  # fmt: skip
    # One thread: on a busy machine the second waits for a core, 30 ms an operation.
    with threads(1):
        rates = measure_hardware(shape, tokens=128, repeats=3)
    assert rates["asynchronous"] is False
    assert Hardware("here", **rates).matmul_tflops > 1e-4
    assert 0.05 < rates["launch_us"] < 1000 and rates["cache_passes"] > 0


def test_the_limit_of_the_prediction_is_the_budgets():
    found = cost_model.predict(MISTRAL, HARDWARE["H100-SXM"], KEEP09, 8192)
    assert found["prefill_limit"] == budget.speedup_limit(MISTRAL, KEEP09, 8192)
    assert found["kv_gb"] == pytest.approx(2 * 8 * 128 * 2 * 32 * 8192 / 1e9)


def test_a_mixture_of_experts_and_latent_attention_are_predicted():
    pytest.importorskip("torch")
    for kind in ("mixtral", "deepseek_v3"):
        shape = ModelShape.from_config({"model_type": kind})
        config = PruningConfig.preset("keep09", shape.num_layers)
        found = cost_model.predict(shape, HARDWARE["H100-SXM"], config, 8192)
        assert 1.0 < found["prefill_speedup"] < 1.1 * found["prefill_limit"]
        # A decode step reads the experts that its token meets, not all of them.
        step = found["decode_ms"] / 127
        assert step > 1e3 * 2 * shape.active_weights / HARDWARE["H100-SXM"].bandwidth_gb_s / 1e9
        assert step < 1e3 * 2 * shape.parameters / HARDWARE["H100-SXM"].bandwidth_gb_s / 1e9


def test_the_command_line_says_its_options_and_predicts_what_is_asked(capsys):
    with pytest.raises(SystemExit, match="0"):
        cost_model.main(["--help"])
    told = capsys.readouterr().out
    assert all(word in told for word in ("--hardware", "--new-tokens", "default", "H100-SXM"))
    cost_model.main(["--hardware", "H100-SXM", "--prompt-tokens", "4096"])
    (line,) = capsys.readouterr().out.splitlines()[1:]
    assert line == cost_model.sentence(cost_model.predict(MISTRAL, HARDWARE["H100-SXM"], KEEP09, 4096))
    with pytest.raises(SystemExit, match="2"):
        cost_model.main(["--dtype", "int3"])
    assert "dtype='int3'" in capsys.readouterr().err
