"""Latency, FLOPs and memory of SDTP beside every alternative: measure, report, compare.

    python benchmarks/latency.py run                                      # SDTP's presets at 1,024, 2,048, 4,096 tokens
    python benchmarks/latency.py run --alternatives keep09 --lengths 2048 # and everything else one could do
    python benchmarks/latency.py run --model Qwen/Qwen2-7B-Instruct --lengths 1024 4096 16384 32768
    python benchmarks/latency.py quality                                  # KL and prefill time of all methods on texts
    python benchmarks/latency.py dtypes                                   # bfloat16 against float32 on this device
    python benchmarks/latency.py training                                 # labels and training steps in plain forwards
    python benchmarks/latency.py memory --lengths 2048 4096 8192          # peak bytes of one prefill
    python benchmarks/latency.py predict data/results/latency/latency.jsonl # the cost model against rows from here
    python benchmarks/latency.py report data/results/latency/latency.jsonl
    python benchmarks/latency.py compare OLD.jsonl NEW.jsonl              # ends with 1 if anything got slower

Rows go to ``<out>/latency.jsonl`` one by one, so that a stopped run goes on where it stopped; ``report`` writes
``latency.md`` and ``latency.json`` beside them (the report's columns are described in `sdtp_lib.latency.report`).
A row: ``prompt_tokens, method, family, keep_ratio, repetition, status, prefill_ms (= ttft_ms), decode_ms,
end_to_end_ms, decode_tokens_per_s, new_tokens, part_<name>_ms, tflops, kv_bytes, kv_tokens_per_layer, peak_memory_mb,
energy_j``.
Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from sdtp_lib.commands.arguments import count, method_of
from sdtp_lib.config import PRESETS
from sdtp_lib.latency import report as latency_report
from sdtp_lib.records import RowWriter, atomic_write, markdown_table, project_root, provenance_of, read_rows, write_json


def main(arguments: list[str] | None = None) -> int:
    """Run one of the commands; the exit status is 1 for a comparison that found something slower, else 0."""
    options = parser().parse_args(arguments)
    return options.call(options)


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--model", default="embedded", help="embedded, a local folder or a Hub id")
    common.add_argument("--dtype", default="default", help="default (float32 on a CPU), auto, float32, bfloat16, ...")
    common.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ...; by default what load_model chooses")
    common.add_argument("--attn-implementation", default=None, help="sdpa, eager, flash_attention_2, ...")
    common.add_argument("--pruners", default=None, help="folder of trained pruners; default those that ship for the "
                        "embedded model, for others untrained ones that see the hidden state alone")  # fmt: skip
    common.add_argument("--out", type=Path, default=None, help="folder of the rows, default data/results/latency")
    common.add_argument("--seed", type=int, default=0, help="of the prompts")
    common.add_argument("--repeats", type=count, default=5, help="measured repetitions of each method and length")
    common.add_argument("--threads", type=count, default=None, help="CPU threads, default torch's own choice")

    def command(name: str, call, help_text: str, parents=(common,)) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help_text, parents=list(parents))
        sub.set_defaults(call=call)
        return sub

    run = command("run", run_latency, "time methods in turn")
    run.add_argument("--lengths", type=count, nargs="+", default=[1024, 2048, 4096], help="prompt tokens")
    run.add_argument("--new-tokens", type=count, default=128, help="generated, the prefill's included")
    run.add_argument("--presets", nargs="*", choices=list(PRESETS), default=["keep09", "keep08", "keep07"],
                     help="of SDTP")  # fmt: skip
    run.add_argument("--alternatives", nargs="*", choices=list(PRESETS), default=[], metavar="PRESET",
                     help="also time everything else at the prefill FLOPs of these presets")  # fmt: skip
    run.add_argument("--method", nargs="+", type=method_of, default=[], metavar="NAME",
                     help="published methods too, as NAME (its paper's budget) or NAME@2x")  # fmt: skip
    run.add_argument("--identity", action="store_true", help="also time SDTP at keep ratio 1.0")
    quality = command("quality", run_quality, "KL and prefill time of every method on held-out texts")
    quality.add_argument("--prompt-tokens", type=count, default=1024)
    quality.add_argument("--samples", type=count, default=6, help="of each kind of text")
    dtypes = command("dtypes", run_dtypes, "bfloat16 against float32")
    dtypes.add_argument("--prompt-tokens", type=count, default=1024)
    training = command("training", run_training, "saliency passes and training steps as ratios of plain forwards")
    training.add_argument("--prompt-tokens", type=count, default=512)
    training.add_argument("--samples", type=count, default=8, help="trained on, to time a step")
    memory = command("memory", run_memory, "peak bytes of one prefill, unpruned and keep09")
    memory.add_argument("--lengths", type=count, nargs="+", default=[2048, 4096, 8192])
    predict = command("predict", run_predict, "the cost model, with this machine's rates, against its rows")
    predict.add_argument("rows", type=Path, help="a row file that `run` wrote on this machine")
    report = command("report", write_report, "Markdown and JSON beside a row file", parents=())
    report.add_argument("rows", type=Path)
    report.add_argument("--quiet-only", action="store_true",
                        help="leave out repetitions in which others had the CPU, told by CPU time")  # fmt: skip
    compare = command("compare", print_comparison, "two row files, by prompt length and method", parents=())
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    return whole


def run_latency(options: argparse.Namespace) -> int:
    from sdtp_lib.architectures import num_layers
    from sdtp_lib.config import PruningConfig
    from sdtp_lib.latency import run as latency_run
    from sdtp_lib.latency import variants
    from sdtp_lib.latency.measure import threads
    from sdtp_lib.methods.variant import Variant

    model, _, scorer, writer = _prepared(options)

    def methods_at(tokens: int) -> list[Variant]:
        found = variants.presets(model, scorer, options.presets)
        if options.identity:
            whole = PruningConfig.preset("keep09", num_layers(model), keep_ratio=1.0)
            found.insert(1, Variant("keep1.0", whole, scorer, kind="SDTP"))
        found += variants.alternatives(model, scorer, tokens, options.alternatives)
        return found + variants.named(model, options.method, tokens, scorer)

    with threads(options.threads), writer, tqdm(unit=" run") as bar:
        latency_run.run(
            model, writer, methods_at, options.lengths, new_tokens=options.new_tokens, repeats=options.repeats,
            seed=options.seed, progress=latency_run.progress_on(bar),
        )  # fmt: skip
    return _report(writer.path)


def run_quality(options: argparse.Namespace) -> int:
    import pandas

    from sdtp_lib.evaluation import tables as evaluation_tables
    from sdtp_lib.latency import run as latency_run
    from sdtp_lib.latency import variants
    from sdtp_lib.latency.measure import threads

    model, tokenizer, scorer, writer = _prepared(options)
    samples = latency_run.quality_samples(
        tokenizer, prompt_tokens=options.prompt_tokens, count=options.samples, continuation_tokens=128,
        seed=options.seed,
    )  # fmt: skip

    def methods_at(length: int):
        return variants.every_method(model, scorer, variants.PRESETS, length)

    with threads(options.threads), writer, tqdm(unit=" sample") as bar:
        latency_run.run_quality(model, writer, methods_at, samples, progress=latency_run.progress_on(bar))
    rows = read_rows(writer.path)
    points = pandas.DataFrame(latency_report.quality_points(rows))
    print("\nKL to the unpruned model [nats per token] and prefill time\n")
    columns = ["text", "method", "samples", "kl_nats", "prefill_ms", "prefill_speedup"]
    print(evaluation_tables.markdown(points[columns]))
    print("\nEach family at the KL of SDTP keep09: its time over SDTP's, and the same in FLOPs (the bound)\n")
    print(evaluation_tables.markdown(pandas.DataFrame(latency_report.at_equal_quality(rows)).drop(columns="reference")))
    return 0


def run_dtypes(options: argparse.Namespace) -> int:
    import torch

    from sdtp_lib.latency import run as latency_run
    from sdtp_lib.latency.measure import summarise

    model, _, _, writer = _prepared(options)
    with writer:
        rows = latency_run.dtype_comparison(
            model, options.prompt_tokens, (torch.float32, torch.bfloat16), repeats=options.repeats, seed=options.seed
        )
        for row in rows:
            key = f"dtypes/{options.prompt_tokens}/{row['variant']}/{row['repetition']}"
            if not writer.done(key):
                writer.add(key, kind="dtypes", prompt_tokens=options.prompt_tokens, **row)
    for row in summarise(rows):
        print(f"{row['variant']}: prefill of {options.prompt_tokens} tokens {row['latency_ms']:,.0f} ms "
              f"({row['latency_ms_low']:,.0f} to {row['latency_ms_high']:,.0f}), KL {row['kl_nats']:.4f} nats"
              )  # fmt: skip
    return 0


def run_training(options: argparse.Namespace) -> int:
    from sdtp_lib.architectures import num_layers
    from sdtp_lib.latency import training_cost as latency_training
    from sdtp_lib.latency.measure import threads

    model, _, _, writer = _prepared(options)
    layers = range(4, num_layers(model), 3)
    with threads(options.threads), writer:
        rows = latency_training.measure_costs(
            model, layers, prompt_tokens=options.prompt_tokens, samples=options.samples, repeats=options.repeats,
            seed=options.seed,
        )  # fmt: skip
        for row in rows:
            key = f"training/{options.prompt_tokens}/{options.samples}/{row['what']}"
            if not writer.done(key):
                writer.add(key, kind="training", prompt_tokens=options.prompt_tokens, samples=options.samples, **row)
            print(f"{row['what']:38} {row['ms']:9,.0f} ms  {row['forwards']:5.2f} forwards  "
                  f"{row['over_backward']:5.2f} of forward + backward")  # fmt: skip
    return 0


def run_memory(options: argparse.Namespace) -> int:
    from sdtp_lib.latency import measure as profiling
    from sdtp_lib.latency import run as latency_run
    from sdtp_lib.latency import variants

    model, _, scorer, writer = _prepared(options)
    methods = variants.presets(model, scorer, ("keep09",))
    vocabulary = model.config.get_text_config().vocab_size
    with writer:
        scorer_ids = writer.scored_by({method.name: method.scorer for method in methods})
        for tokens in options.lengths:
            for method in methods:
                key, config_hash = f"memory/{tokens}/{method.name}", latency_run.config_hash(method, model, tokens)
                if writer.done(key, config_hash=config_hash):
                    continue
                ids = latency_run.prompt_ids(vocabulary, tokens, options.seed).to(model.device)
                once = profiling.measure_once(
                    lambda m=method, i=ids: latency_run.row_fields(m, model, i, 1), model.device
                )
                allocated = latency_run.peak_allocated(model, method, tokens, options.seed)
                row = writer.add(
                    key, kind="memory", prompt_tokens=tokens, method=method.name, config_hash=config_hash,
                    scorer_id=scorer_ids[method.name],
                    peak_memory_mb=once["peak_memory_mb"], memory_growth_mb=once["memory_growth_mb"],
                    peak_allocated_mb=allocated / 1e6, kv_bytes=once["kv_bytes"],
                )  # fmt: skip
                print(f"{tokens} tokens, {method.name}: peak {row['peak_memory_mb']:,.0f} MB in all, "
                      f"{row['peak_allocated_mb']:,.0f} MB beyond the weights, KV {row['kv_bytes'] / 1e6:.1f} MB"
                      )  # fmt: skip
    return 0


def run_predict(options: argparse.Namespace) -> int:
    import pandas

    from sdtp_lib import load_model
    from sdtp_lib.config import PruningConfig
    from sdtp_lib.evaluation import tables as evaluation_tables
    from sdtp_lib.latency import cost_model as costmodel
    from sdtp_lib.latency.hardware import measure_hardware
    from sdtp_lib.latency.measure import threads
    from sdtp_lib.model_shape import ModelShape

    rows = read_rows(options.rows)
    timed = {row["model"] for row in rows}
    if timed != {options.model}:
        raise ValueError(f"--model {options.model}: {options.rows} has rows of {sorted(timed)}; name that model.")
    model, _ = load_model(options.model, dtype=options.dtype, device=options.device)
    shape = ModelShape.from_model(model)
    with threads(options.threads):
        rates = measure_hardware(shape, dtype=model.dtype, device=model.device, repeats=options.repeats)
    presets = {name: PruningConfig.preset(name, shape.num_layers) for name in ("keep09", "keep08", "keep07")}
    dtype = str(model.dtype).removeprefix("torch.")
    hardware = costmodel.Hardware("this machine", **rates)
    table = latency_report.summary(rows)
    found = costmodel.against_measured(shape, hardware, table, {"unpruned": None, **presets}, dtype=dtype)
    if not found:
        raise ValueError(f"{options.rows} has no times of the unpruned model or a preset: make some with `run`.")
    found = pandas.DataFrame(found)
    print(", ".join(f"{name} {value:.4g}" for name, value in rates.items()))
    print(evaluation_tables.markdown(found, digits=1))
    for what, part in found.groupby("what", sort=False):
        print(f"{what}: error {part.error_percent.min():+.1f} to {part.error_percent.max():+.1f} %, "
              f"median of absolute errors {part.error_percent.abs().median():.1f} %")  # fmt: skip
    return 0


def write_report(options: argparse.Namespace) -> int:
    return _report(options.rows, quiet_only=options.quiet_only)


def print_comparison(options: argparse.Namespace) -> int:
    found = latency_report.compare(read_rows(options.before), read_rows(options.after))
    body, several = [], latency_report.several_new_tokens(found)
    for entry in found:
        numbers = [f"{entry[name]:,.1f}" if entry[name] else "-" for name in ("before_ms", "after_ms")]
        ratio = f"{entry['ratio']:.3f}" if entry["ratio"] else "-"
        what = entry["field"].removesuffix("_ms")
        place = f"{entry['prompt_tokens']}" + (f"+{entry['new_tokens']}" if several else "")
        body.append((place, entry["method"], what, *numbers, ratio, entry["verdict"]))
    header = ("prompt", "method", "what", "before ms", "after ms", "after / before", "verdict")
    print(markdown_table(header, body))
    return int(any(entry["verdict"] == "slower" for entry in found))


def _prepared(options: argparse.Namespace):
    """Model, tokenizer, scorer (trained or untrained pruners) and the writer, not yet open, of a measuring command."""
    import torch

    from sdtp_lib import TokenPruners, load_model
    from sdtp_lib.architectures import num_layers
    from sdtp_lib.config import PruningConfig
    from sdtp_lib.shipped import shipped_for

    model, tokenizer = load_model(
        options.model, dtype=options.dtype, device=options.device, attn_implementation=options.attn_implementation
    )
    pruners = options.pruners or shipped_for(options.model)
    if pruners:
        scorer = TokenPruners.from_pretrained(str(pruners))
    else:
        config = PruningConfig.preset("keep09", num_layers(model))
        torch.manual_seed(options.seed)  # their numbers decide no time, but a run that goes on has the same scorer
        scorer = TokenPruners(model.config.get_text_config().hidden_size, config.layers)
    out = options.out or project_root() / "data" / "results" / "latency"
    # The number of CPU threads decides no time on a GPU.
    threads = options.threads or torch.get_num_threads() if model.device.type == "cpu" else None
    names = {"model_name": options.model, "pruners": Path(pruners).name if pruners else None}
    stamp = provenance_of(model, seed=options.seed, threads=threads, **names)
    return model, tokenizer, scorer.eval(), RowWriter(out / "latency.jsonl", stamp)


def _report(path: Path, quiet_only: bool = False) -> int:
    rows = read_rows(path)
    note = ""
    if quiet_only:
        from sdtp_lib.latency.measure import undisturbed

        quiet = undisturbed(rows, by=("kind", "prompt_tokens", "method", "new_tokens"))
        note = f"\n{len(rows) - len(quiet)} of {len(rows)} rows left out: other processes had the CPU.\n"
        rows = quiet
    text = latency_report.markdown(rows) + note
    with atomic_write(path.with_suffix(".md")) as temporary:
        temporary.write_text(text, encoding="utf-8")
    write_json(path.with_suffix(".json"), latency_report.by_length(rows))
    print(text)
    return 0


if __name__ == "__main__":
    from sdtp_lib.checked import told

    sys.exit(told(main))
