"""The latency benchmark on tiny models and on numbers made by hand: rows, resume, limits, reports, comparisons."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch

from sdtp_lib import budget, scorers
from sdtp_lib.config import PruningConfig
from sdtp_lib.latency import report as latency_report
from sdtp_lib.latency import run as latency_run
from sdtp_lib.latency import variants
from sdtp_lib.methods.variant import Variant
from sdtp_lib.records import OtherProvenance, RowWriter, read_rows
from tests.benchmarks.commands import command


def row(method, repetition, prefill, decode, *, tokens=1000, tflops=2.0, kv=100, status="ok", **more):
    return {"kind": "latency", "prompt_tokens": tokens, "method": method, "family": method, "repetition": repetition,
            "prefill_ms": prefill, "decode_ms": decode, "end_to_end_ms": prefill + decode, "tflops": tflops,
            "kv_bytes": kv, "kv_tokens_per_layer": [1000, 50], "weight_bytes": 900, "compression_ratio": 1.0,
            "new_tokens": 4, "status": status, **more}  # fmt: skip


BY_HAND = [
    row("unpruned", 0, 200.0, 100.0), row("unpruned", 1, 220.0, 110.0), row("unpruned", 2, 210.0, 105.0),
    row("keep09", 0, 110.0, 95.0, tflops=1.0, kv=50), row("keep09", 1, 110.0, 100.0, tflops=1.0, kv=50),
    row("keep09", 2, 120.0, 105.0, tflops=1.0, kv=50),
]  # fmt: skip


def test_the_summary_gives_the_values_worked_by_hand():
    base, pruned = latency_report.summary(BY_HAND)
    assert base["prefill_speedup"] == 1.0 and base["prefill_share_of_limit"] == 1.0
    # Paired: 200/110, 220/110, 210/120, whose median is 1.818; the limit is 2/1.
    assert pruned["prefill_speedup"] == pytest.approx(200 / 110)
    assert pruned["prefill_limit"] == 2.0
    assert pruned["prefill_share_of_limit"] == pytest.approx(200 / 220)
    # 210 ms prefill and 105 ms decode at best become 105 and 105 * (900 + 50) / (900 + 100).
    assert pruned["end_to_end_limit"] == pytest.approx(315 / (105 + 99.75))
    assert pruned["kv_reduction_percent"] == 50.0 and pruned["flops_reduction_percent"] == 50.0
    assert pruned["kept_tokens"] == 50 and pruned["repetitions"] == 3


def test_the_reports_say_what_the_rows_say():
    report = latency_report.by_length(BY_HAND)
    assert set(report) == {"1000"} and set(report["1000"]) >= {"baseline", "sdtp", "speedup", "kv_reduction"}
    assert report["1000"]["kv_reduction"] == 0.5
    assert report["1000"]["baseline"]["prefill_ms"] == 210.0
    text = latency_report.markdown(BY_HAND)
    assert "| 1000 | keep09 | 110 | 1.82x (0.909) |" in text
    assert latency_report.markdown([]) == "No latency rows.\n"


def test_out_of_memory_is_a_line_of_the_report():
    rows = [*BY_HAND, {"kind": "latency", "prompt_tokens": 8000, "method": "unpruned", "repetition": 0,
                       "status": "out of memory", "family": "unpruned", "tflops": 9.0, "new_tokens": 4}]  # fmt: skip
    assert "| 8000 | unpruned | out of memory |" in latency_report.markdown(rows)


def test_a_comparison_tells_slower_from_noise():
    slower = [{**r, "prefill_ms": r["prefill_ms"] * 1.2} for r in BY_HAND]
    verdicts = {(e["method"], e["field"]): e["verdict"] for e in latency_report.compare(BY_HAND, slower)}
    assert verdicts["keep09", "prefill_ms"] == verdicts["unpruned", "prefill_ms"] == "slower"
    assert verdicts["keep09", "decode_ms"] == "equal"
    noise = [{**r, "prefill_ms": r["prefill_ms"] * 1.02} for r in BY_HAND]
    assert {e["verdict"] for e in latency_report.compare(BY_HAND, noise)} == {"equal"}
    assert {e["verdict"] for e in latency_report.compare(BY_HAND, BY_HAND[:3])} == {"equal", "missing"}


def test_numbers_of_new_tokens_are_paired_and_shown_apart():
    """They were one group: repetitions stood twice in it, and the paired ratios were a cross product."""
    longer = [{**r, "new_tokens": 40, "decode_ms": 10 * r["decode_ms"]} for r in BY_HAND]
    table = latency_report.summary([*BY_HAND, *longer])
    assert [(e["new_tokens"], e["method"], e["repetitions"], e["decode_ms"]) for e in table] == [
        (4, "unpruned", 3, 105.0), (4, "keep09", 3, 100.0), (40, "unpruned", 3, 1050.0), (40, "keep09", 3, 1000.0)
    ]  # fmt: skip
    assert table[1] == latency_report.summary(BY_HAND)[1]
    assert table[3]["decode_speedup_q3"] == pytest.approx(1.076, 1e-3)
    report = latency_report.by_length([*BY_HAND, *longer])
    assert list(report) == ["1000+4", "1000+40"]
    assert report["1000+40"]["baseline"]["decode_ms"] == 1050.0 and report["1000+4"]["baseline"]["decode_ms"] == 105.0
    text = latency_report.markdown([*BY_HAND, *longer])
    assert "| prompt | new tokens | method |" in text and "4/40 new tokens" in text
    assert text.count("| 1000 | 40 | keep09 |") == text.count("| 1000 | 4 | keep09 |") == 2
    found = latency_report.compare([*BY_HAND, *longer], longer)
    verdicts = {(e["new_tokens"], e["verdict"]) for e in found}
    assert verdicts == {(4, "missing"), (40, "equal")}


def test_rows_that_do_not_say_how_many_tokens_were_generated_are_one_group():
    rows = [{name: value for name, value in r.items() if name != "new_tokens"} for r in BY_HAND]
    assert [e["prefill_ms"] for e in latency_report.summary(rows)] == [210.0, 110.0]
    assert list(latency_report.by_length(rows)) == ["1000"]


def quality(method, family, ratio, prefill, kl, sample="a"):
    return {"kind": "quality", "text": "needle", "sample": sample, "method": method, "family": family,
            "keep_ratio": ratio, "prefill_ms": prefill, "kl_nats": kl, "tflops": prefill / 50}  # fmt: skip


def test_equal_quality_is_interpolated_between_measured_ratios():
    rows = [
        quality("unpruned", "unpruned", None, 100.0, 0.0), quality("keep09", "SDTP", 0.9, 50.0, 0.1),
        quality("f09", "filter", 0.9, 90.0, 0.01), quality("f07", "filter", 0.7, 70.0, 1.0),
        quality("k09", "KV only", 0.9, 101.0, 0.5), quality("p09", "propagation", 0.9, 60.0, 0.05),
    ]  # fmt: skip
    found = {entry["family"]: entry for entry in latency_report.at_equal_quality(rows)}
    # Half way between 0.01 and 1.0 on a log scale lies 0.1: half way between 90 and 70 ms.
    assert found["filter"]["prefill_ms"] == pytest.approx(80.0)
    assert found["filter"]["sdtp_is_faster_by"] == found["filter"]["flops_bound"] == pytest.approx(1.6)
    assert found["KV only"]["verdict"] == "never as good" and found["KV only"]["prefill_ms"] is None
    assert found["propagation"]["verdict"] == "better throughout"


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model()


def stages():
    return [Variant("unpruned"), Variant("keep07", PruningConfig((2, 4), 0.7), scorers.recency(), kind="SDTP")]


def test_a_run_writes_a_row_a_repetition_and_goes_on_where_it_stopped(model, tmp_path):
    path = tmp_path / "latency.jsonl"
    with RowWriter(path, {"device": "cpu"}) as writer:
        first = latency_run.run(model, writer, lambda tokens: stages(), [200], new_tokens=3, repeats=1)
    assert len(first) == 2
    with RowWriter(path, {"device": "cpu"}) as writer:
        second = latency_run.run(model, writer, lambda tokens: stages(), [200, 100], new_tokens=3, repeats=2)
        third = latency_run.run(model, writer, lambda tokens: stages(), [200, 100], new_tokens=3, repeats=2)
    assert len(second) == 2 + 4 and third == []
    rows = read_rows(path)
    assert len({r["key"] for r in rows}) == 8
    pruned = next(r for r in rows if r["method"] == "keep07" and r["prompt_tokens"] == 200)
    assert pruned["kv_tokens_per_layer"] == [200, 200, 140, 140, 98, 98]
    assert pruned["compression_ratio"] == pytest.approx(1200 / 876)
    assert pruned["prefill_ms"] > 0 and pruned["decode_ms"] > 0 and pruned["device"] == "cpu"
    assert len(latency_report.summary(rows)) == 4


def test_out_of_memory_at_one_length_leaves_the_rest_of_the_run(model, tmp_path):
    @contextlib.contextmanager
    def too_long():
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    greedy = Variant("greedy", around=too_long)
    with RowWriter(tmp_path / "rows.jsonl", {}) as writer:
        for _ in range(2):
            latency_run.run(model, writer, lambda tokens: [*stages(), greedy], [64], new_tokens=2, repeats=2)
        rows = read_rows(writer.path)
    assert [r["status"] for r in rows].count("out of memory") == 1
    assert len(rows) == 5
    assert "| 64 | greedy | out of memory |" in latency_report.markdown(rows)


def test_quality_rows_say_zero_for_the_plain_model_and_more_for_a_pruned_one(model, tmp_path):
    generator = torch.Generator().manual_seed(0)
    samples = {"noise": [{"id": str(i), "prompt_ids": torch.randint(3, 128, (200,), generator=generator).tolist(),
                          "response_ids": [5, 6, 7, 8]} for i in range(2)]}  # fmt: skip
    with RowWriter(tmp_path / "rows.jsonl", {}) as writer:
        assert len(latency_run.run_quality(model, writer, lambda tokens: stages(), samples)) == 4
        assert latency_run.run_quality(model, writer, lambda tokens: stages(), samples) == []
        points = {p["method"]: p for p in latency_report.quality_points(read_rows(writer.path))}
    assert points["unpruned"]["kl_nats"] == pytest.approx(0.0, abs=1e-9)
    assert points["keep07"]["kl_nats"] > 1e-9 and points["keep07"]["samples"] == 2


@pytest.mark.parametrize(
    ("preset", "tokens", "too_slow"),
    [("keep09", 1000, set()), ("keep07", 400, {"lazyllm", "gemfilter", "fastkv", "claa", "sliminfer", "pyramidinfer"})],
)
def test_every_alternative_computes_the_flops_of_its_preset_or_is_left_out(preset, tokens, too_slow, tiny_model):
    model = tiny_model(
        num_hidden_layers=30, hidden_size=16, head_dim=4, intermediate_size=16, max_position_embeddings=2048
    )
    shape = budget.ModelShape.from_model(model)
    counts = budget.tokens_per_layer(PruningConfig.preset(preset, 30), 30, tokens)
    wanted = budget.prefill_flops(shape, counts) / 1e12
    found = variants.alternatives(model, scorers.recency(), tokens, [preset])
    assert {method.kind for method in found} == {*variants.SCALED, "snapkv", "earlier-scheme"} - too_slow
    for method in found:
        assert method.name == f"{method.kind} {preset}"
        if method.kind in variants.SCALED:
            tflops = latency_run.describe(method, model, tokens)["tflops"]
            assert tflops == pytest.approx(wanted, rel=0.05), method.name
            assert tflops <= wanted * 1.0001


def test_types_are_compared_in_turn_and_the_models_own_comes_back(tiny_model):
    model = tiny_model()
    rows = latency_run.dtype_comparison(model, 32, (torch.float32, torch.bfloat16), repeats=2)
    assert [r["variant"] for r in rows] == ["float32", "bfloat16"] * 2
    # So small a divergence that rounding may give it either sign.
    assert rows[0]["kl_nats"] == 0.0 and 0 < abs(rows[1]["kl_nats"]) < 0.1
    assert model.dtype == torch.float32


def test_pruned_prefill_allocates_linearly_in_the_prompt(tiny_model):
    # As many key as query heads: where they are shared, torch 2.7's own attention on a CPU is quadratic.
    model = tiny_model(max_position_embeddings=4096, num_key_value_heads=4)
    method = stages()[1]
    short, long = (latency_run.peak_allocated(model, method, tokens) for tokens in (1000, 4000))
    assert long < 4.4 * short


def test_labels_and_training_steps_are_given_in_plain_forwards(tiny_model, monkeypatch):
    from sdtp_lib.latency import training_cost as latency_training

    asked = []
    monkeypatch.setattr(
        latency_training, "training_seconds", lambda *_, **config: asked.append(config) or 0.001 * len(asked)
    )
    found = latency_training.measure_costs(tiny_model(), (2, 4), prompt_tokens=64, samples=2, repeats=1)
    rows = {row["what"]: row for row in found}
    assert rows["forward"]["forwards"] == rows[latency_training.BACKWARD]["over_backward"] == 1.0
    assert rows["saliency, removal"]["ms"] > 0
    forward_ms = rows["forward"]["ms"]
    assert rows["training step with the LM loss"]["forwards"] == pytest.approx(2.0 / forward_ms)
    assert [set(config) - {"seed"} for config in asked] == [set(), {"lm_weight"}, {"distill_weight"}]


@pytest.mark.slow
def test_a_training_step_is_what_further_samples_cost_and_leaves_nothing_behind(tiny_model, tmp_path, monkeypatch):
    from sdtp_lib.latency import training_cost as latency_training

    readings = iter([9.0, 10.0, 16.0])  # seconds of the run before the clock, of three samples, of six

    class Clock:
        def __init__(self, _device):
            self.reading = next(readings)

        def mark(self, name):
            self.name = name

        def parts_ms(self):
            return {self.name: 1e3 * self.reading}

    monkeypatch.setattr(latency_training.measure, "Stopwatch", Clock)
    monkeypatch.setattr(latency_training.tempfile, "tempdir", str(tmp_path))
    samples = [{"id": str(n), "prompt_ids": list(range(5, 69)), "response_ids": [7, 8, n]} for n in range(6)]
    assert latency_training.training_seconds(tiny_model(), samples, (2, 4)) == 2.0
    assert list(tmp_path.iterdir()) == []


def test_the_command_reports_and_compares_row_files(tmp_path, capsys):
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    for path, factor in ((old, 1.0), (new, 1.5)):
        with RowWriter(path, {}) as writer:
            for r in BY_HAND:
                fields = {k: v for k, v in r.items() if k != "kind"}
                fields["prefill_ms"] *= factor
                writer.add(f"{r['method']}/{r['repetition']}", kind="latency", **fields)
    assert command("latency")(["report", str(old)]) == 0
    assert json.loads((tmp_path / "old.json").read_text())["1000"]["speedup"]["prefill"] == pytest.approx(200 / 110)
    assert "keep09" in (tmp_path / "old.md").read_text()
    assert command("latency")(["compare", str(old), str(old)]) == 0
    assert command("latency")(["compare", str(old), str(new)]) == 1
    assert "slower" in capsys.readouterr().out


@pytest.mark.embedded
@pytest.mark.slow
def test_the_benchmark_runs_on_the_embedded_model(tmp_path):
    arguments = ["run", "--lengths", "512", "--new-tokens", "4", "--repeats", "1", "--out", str(tmp_path)]
    assert command("latency")([*arguments, "--identity", "--alternatives", "keep09"]) == 0
    rows = read_rows(tmp_path / "latency.jsonl")
    assert len(rows) == 1 + 1 + 3 + 9
    assert {r["status"] for r in rows} == {"ok"} and {r["weights"] for r in rows} == {"Q4_1, dequantised"}


def test_times_of_another_scorer_are_refused_and_memory_that_ran_out_is_tried_by_the_next_run(model, tmp_path):
    path, roomy = tmp_path / "rows.jsonl", []

    @contextlib.contextmanager
    def fits_once_there_is_room():
        if not roomy:
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    greedy = Variant("greedy", around=fits_once_there_is_room)

    def run(*found):
        with RowWriter(path, {}) as writer:
            latency_run.run(model, writer, lambda tokens: [*stages(), *found], [64], new_tokens=2, repeats=1)
        return {row["method"]: row["status"] for row in read_rows(path)}

    assert run(greedy)["greedy"] == "out of memory"
    roomy.append(True)
    assert run(greedy)["greedy"] == "ok" and len(read_rows(path)) == 3
    other = Variant("keep07", PruningConfig((2, 4), 0.7), scorers.random(), kind="SDTP")
    with pytest.raises(OtherProvenance, match="rows of 'keep07' that were made by Recency"):
        run(other)
