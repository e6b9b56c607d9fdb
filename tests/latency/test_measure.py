"""The measuring itself: order, warm-up, pairing, peaks, out of memory, the clock inside a generation."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from sdtp_lib.latency import generation
from sdtp_lib.latency import measure as profiling
from sdtp_lib.latency.memory import EnergyWatch, peak_allocated_bytes


def test_variants_run_in_turn_with_the_order_turning_and_warm_up_left_out():
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in "AB"}
    rows = profiling.measure(variants, repeats=2, warmup=1)
    assert calls == ["B", "A", "A", "B", "B", "A"]
    assert [(row["variant"], row["repetition"]) for row in rows] == [("A", 0), ("B", 0), ("B", 1), ("A", 1)]


def test_latency_covers_the_call_and_its_fields_join_the_row():
    def sleep():
        time.sleep(0.02)
        return {"answer": 7}

    (row,) = profiling.measure({"sleep": sleep}, repeats=1, warmup=0)
    assert 19 < row["latency_ms"] < 500
    assert row["answer"] == 7 and row["status"] == "ok"


def test_out_of_memory_is_recorded_once_and_the_others_go_on():
    def greedy():
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")

    rows = profiling.measure({"greedy": greedy, "modest": lambda: None}, repeats=3, warmup=1)
    assert [row["status"] for row in rows if row["variant"] == "greedy"] == ["out of memory"]
    assert [row["repetition"] for row in rows if row["variant"] == "modest"] == [0, 1, 2]
    assert profiling.summarise(rows)[0] == {"variant": "greedy", "count": 0, "status": "out of memory"}


def test_a_real_failed_allocation_counts_as_out_of_memory():
    (row,) = profiling.measure({"huge": lambda: torch.empty(1 << 60)}, repeats=1, warmup=0)
    assert row["status"] == "out of memory" and row["latency_ms"] is None


def test_another_error_is_not_swallowed():
    with pytest.raises(RuntimeError, match="a bug"):
        profiling.measure({"bad": lambda: (_ for _ in ()).throw(RuntimeError("a bug"))}, repeats=1, warmup=0)


def test_what_is_done_is_not_measured_again():
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in "AB"}
    kept = []
    rows = profiling.measure(
        variants, repeats=2, warmup=1, done=lambda variant, repetition: variant == "A" or repetition == 0,
        on_row=kept.append,
    )  # fmt: skip
    assert calls == ["B", "B"]
    assert kept == rows and [(row["variant"], row["repetition"]) for row in rows] == [("B", 1)]


def test_wrong_repeats_are_refused():
    with pytest.raises(ValueError, match="repeats=0"):
        profiling.measure({"a": lambda: None}, repeats=0)


def test_peak_memory_sees_a_tensor_that_is_gone_when_the_call_returns():
    def call():
        torch.ones(40_000_000)  # 160 MB

    (row,) = profiling.measure({"call": call}, repeats=1, warmup=0)
    if row["peak_memory_mb"] is None:
        pytest.skip("this system does not tell the resident set")
    assert 140 < row["memory_growth_mb"] < 400


def test_allocated_bytes_are_the_ones_alive_at_once():
    def call():
        first = torch.ones(1_000_000)  # 4 MB
        second = first + 1  # 8 MB together
        del first
        third = second + 1  # still 8 MB
        return third.sum()

    assert peak_allocated_bytes(call) == pytest.approx(8e6, rel=0.01)


def test_the_count_of_memory_does_not_tell_of_its_profiler():
    code = "import torch; from sdtp_lib.latency.memory import peak_allocated_bytes as f; f(lambda: torch.ones(9) + 1)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "" and "profiler" not in ran.stderr.lower(), ran.stderr


def test_energy_is_a_number_or_unknown():
    joules = EnergyWatch("cpu").read_joules()
    assert joules is None or joules >= 0


def test_a_disturbed_repetition_is_told_by_its_share_of_cpu_time():
    rows = [
        {"variant": "A", "cpu_share": share, "latency_ms": ms} for share, ms in ((1.0, 9.0), (0.97, 5.0), (0.7, 1.0))
    ]
    rows += [{"variant": "B", "cpu_share": 0.6, "latency_ms": 2.0}, {"variant": "B", "cpu_share": None}]
    assert profiling.undisturbed(rows) == [rows[0], rows[1], rows[3], rows[4]]


def test_a_call_that_sleeps_has_a_small_share_of_cpu_time():
    rows = profiling.measure({"sleep": lambda: time.sleep(0.2)}, repeats=1, warmup=0)
    assert rows[0]["cpu_share"] < 0.3


def test_quartiles_are_the_ones_of_the_values():
    assert profiling.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert profiling.quartiles([7.0]) == (7.0, 7.0, 7.0)
    assert profiling.quartiles([None]) is None


def test_a_summary_has_medians_quartiles_and_what_all_rows_agree_on():
    rows = [{"variant": "A", "repetition": i, "status": "ok", "latency_ms": ms, "device": "cpu", "note": str(i)}
            for i, ms in enumerate((10.0, 30.0, 20.0))]  # fmt: skip
    (summary,) = profiling.summarise(rows)
    assert summary == {"variant": "A", "count": 3, "status": "ok", "latency_ms": 20.0, "latency_ms_low": 15.0,
                       "latency_ms_high": 25.0, "device": "cpu"}  # fmt: skip


def test_the_stopwatch_adds_parts_of_one_name():
    watch = profiling.Stopwatch()
    time.sleep(0.01)
    watch.mark("a")
    watch.mark("b")
    time.sleep(0.01)
    watch.mark("a")
    parts = watch.parts_ms()
    assert 19 < parts["a"] < 500 and parts["b"] < 5


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with profiling.threads(1) as count:
        assert count == torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_a_timed_generation_gives_the_ids_of_generate(tiny_model):
    model = tiny_model(num_hidden_layers=2)
    ids = torch.arange(3, 23)[None]
    found = generation.prefill_and_decode(model, ids, 6)
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    assert found.token_ids.tolist() == expected[:, 20:].tolist()
    fields = found.fields()
    assert fields["end_to_end_ms"] == pytest.approx(fields["ttft_ms"] + fields["decode_ms"])
    assert fields["decode_tokens_per_s"] == pytest.approx(5e3 / fields["decode_ms"])


def test_time_to_first_token_and_decode_are_kept_apart(monkeypatch):
    def prefill(model, input_ids):
        time.sleep(0.05)
        return torch.zeros(1, 1, 4), None

    def step(model, token, cache):
        time.sleep(0.01)
        return torch.zeros(1, 1, 4), None

    monkeypatch.setattr(generation, "plain_prefill", prefill)
    monkeypatch.setattr(generation, "plain_step", step)
    fields = generation.prefill_and_decode(None, torch.ones(1, 3), 4).fields()
    assert 49 < fields["ttft_ms"] < 500
    assert 29 < fields["decode_ms"] < 500
    with pytest.raises(ValueError, match="new_tokens=0"):
        generation.prefill_and_decode(None, torch.ones(1, 3), 0)


@pytest.mark.gpu
def test_cuda_events_wait_for_the_device():
    size = 4096
    a = torch.randn(size, size, device="cuda")
    (row,) = profiling.measure({"matmul": lambda: (a @ a, None)[1]}, repeats=1, warmup=1, device="cuda")
    assert row["latency_ms"] > 2 * size**3 / 2e15 * 1e3
    assert row["peak_memory_mb"] >= 2 * 4 * size * size / 1e6
