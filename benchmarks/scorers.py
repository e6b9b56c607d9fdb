"""What each score costs in quality at the same budget, on text, long-context tasks, instructions and news.

One command, one row per test set, sample, setting and scorer, resumable, deterministic:

    python benchmarks/scorers.py --quick            # about 10 minutes on 2 cores
    python benchmarks/scorers.py                    # 32 prompts per test set, 1,024 and 2,048 tokens: hours on 2 cores
    python benchmarks/scorers.py --pruners SDTP=smollm2-135m-instruct --pruners paper=DIR
    python benchmarks/scorers.py --scores SDTP --test-sets needle --prompts 500 --lengths 512 --settings r=0.9
    python benchmarks/scorers.py --tables           # only print what the rows hold
    torchrun --nproc-per-node 4 benchmarks/scorers.py           # samples shared among GPUs or, without one, cores

Prints Markdown tables and writes `quality_over_flops.png` beside the rows.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from sdtp_lib import PruningConfig, evaluation, load_model, methods, plots
from sdtp_lib.architectures import num_layers
from sdtp_lib.commands.arguments import amount, count
from sdtp_lib.data.test_sets import TEST_SETS, samples_of
from sdtp_lib.evaluation import tables as evaluation_tables
from sdtp_lib.processes import Share
from sdtp_lib.records import project_root, provenance_of, read_frame
from sdtp_lib.scorers.by_name import loaded, scorer_named
from sdtp_lib.shipped import shipped_for
from sdtp_lib.training.oracles import oracle_methods

PRESETS = {"r=0.9": "keep09", "r=0.8": "keep08", "r=0.7": "keep07"}
QUICK = {"prompts": 3, "lengths": [512], "oracle_prompts": 1, "settings": ["r=0.9", "r=0.7"]}
QUICK_TEST_SETS = ["text", "needle", "multi_key", "instructions"]
MIXED = "attention + recency"
WEIGHTS = (0.1, 0.3, 1.0, 3.0)


def not_negative(text: str) -> float:
    """For ``type=``: a number of 0 or more."""
    with contextlib.suppress(ValueError):
        if 0 <= (number := float(text)) < float("inf"):
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="embedded, a folder or a Hub id")
    parser.add_argument("--dtype", default=None, help="float32, bfloat16, auto; default by device")
    parser.add_argument("--pruners", action="append", type=scorer_named, metavar="NAME=DIR", help="begins with SDTP")
    parser.add_argument("--prompts", type=count, default=32, help="samples per test set")
    parser.add_argument("--oracle-prompts", type=amount, default=8, help="of these, how many for the oracles")
    parser.add_argument("--lengths", type=count, nargs="+", default=[1024, 2048], help="prompt tokens")
    parser.add_argument("--settings", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    parser.add_argument("--test-sets", nargs="+",
                        choices=TEST_SETS, default=list(TEST_SETS), help="test sets")  # fmt: skip
    parser.add_argument("--oracles", nargs="*", default=["gradient_x_hidden", "removal"], help="labels of saliency")
    parser.add_argument("--scores", nargs="+", default=None, metavar="NAME", help="only these scores; default all")
    parser.add_argument("--method", nargs="+", choices=methods.names(), default=[], metavar="NAME",
                        help="published methods too, at the FLOPs of each setting")  # fmt: skip
    parser.add_argument("--recency-weight", type=not_negative, default=None, help="of attention + recency; default: "
                        "tuned")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, default=project_root() / "data" / "results" / "scorers")
    parser.add_argument("--quick", action="store_true", help="small sizes: 10 minutes on 2 cores")
    parser.add_argument(
        "--tables", action="store_true", help="print tables of the rows that are there, compute nothing"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(QUICK)
        options.test_sets = [test_set for test_set in options.test_sets if test_set in QUICK_TEST_SETS]
        options.run_dir = options.run_dir.with_name(options.run_dir.name + "-quick")
    return options


def learned_methods(options: argparse.Namespace, model) -> list[evaluation.Variant]:
    """The pruners named on the command line, or those that ship with the project."""
    shipped = [scorer_named(evaluation_tables.LEARNED_PREFIX)] if shipped_for(options.model) else []
    named = options.pruners or shipped
    return [evaluation.Variant(name, scorer=scorer) for name, scorer in loaded(named, model).items()]


def tuned_weight(model, tokenizer, configs, length: int, seed: int, share: Share, path: Path, stamp: dict) -> float:
    """Recency's weight beside attention, chosen on training-side samples, never on those that are measured."""
    config = {name: configs[name] for name in list(configs)[:1]}
    samples = [s for test_set in ("text", "needle") for s in samples_of(
        test_set, tokenizer, prompt_tokens=length, count=2, seed=seed, split="train")]  # fmt: skip
    mixed = {weight: evaluation.baseline_methods(recency_weight=weight)[-1] for weight in WEIGHTS}
    methods = [evaluation.Variant(f"weight {weight}", scorer=method.scorer) for weight, method in mixed.items()]
    with share.rows(path, stamp) as writer:
        evaluation.compare_scorers(model, share.of(samples), config, methods, writer, test_set="tuning")
    rows = read_frame(path)
    # The file may hold those of another first setting or length, too.
    asked = rows.setting.isin(config) & rows["sample"].isin([sample["id"] for sample in samples])
    rows = rows[(rows.cell == "tuning") & (rows.kind == "scorer") & asked]
    if rows.empty:
        raise ValueError("no weight of recency could be measured on the tuning samples: give --recency-weight.")
    return float(rows.groupby("scorer").kl_nats.mean().idxmin().removeprefix("weight "))


def wanted(methods: list[evaluation.Variant], names: list[str] | None) -> list[evaluation.Variant]:
    """The methods of these names, all without any."""
    known = [method.name for method in methods]
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise ValueError(f"--scores {unknown[0]!r} is unknown: choose among {', '.join(known)}.")
    return [method for method in methods if names is None or method.name in names]


def measure(options: argparse.Namespace, rows_path: Path, share: Share) -> None:
    model, tokenizer = load_model(options.model, dtype=options.dtype, device=share.device)
    layers = num_layers(model)
    configs = {name: PruningConfig.preset(PRESETS[name], num_layers=layers) for name in options.settings}
    stamp = provenance_of(model, model_name=options.model, seed=options.seed)
    learned = learned_methods(options, model)  # first: pruners of another model end the run
    weight = options.recency_weight
    if weight is None and (options.scores is None or MIXED in options.scores):
        weight = tuned_weight(model, tokenizer, configs, min(options.lengths), options.seed, share, rows_path, stamp)
    deployable = [
        *evaluation.baseline_methods(recency_weight=1.0 if weight is None else weight),
        *learned,
    ]
    known = [method.name for method in deployable]
    more = [name for name in options.method if name not in known]
    deployable += evaluation.published_methods(more)
    deployable = wanted(deployable, options.scores)
    oracles = oracle_methods(options.oracles)
    # Sample by sample over all test sets: a run that is stopped has some of everything.
    plan = []
    for length in options.lengths:
        sizes = {"prompt_tokens": length, "count": options.prompts, "seed": options.seed, "split": "heldout"}
        for test_set in options.test_sets:
            samples = samples_of(test_set, tokenizer, **sizes)
            if not samples and share.is_first:
                print(f"{test_set}: its data are not at hand, left out", file=sys.stderr)
            plan += [(number, f"{test_set}@{length}", sample) for number, sample in enumerate(samples)]
    plan.sort(key=lambda item: item[0])
    with share.rows(rows_path, stamp) as writer:
        bar = tqdm(share.of(plan), unit="sample", desc="measure", mininterval=5, disable=not share.is_first)
        for number, test_set, sample in bar:
            bar.set_postfix_str(test_set)
            methods = deployable + (oracles if number < options.oracle_prompts else [])
            evaluation.compare_scorers(model, [sample], configs, methods, writer, test_set=test_set)


def report(rows_path: Path, only: list[str] | None = None) -> None:
    frame = evaluation_tables.rows_in(rows_path)
    if only is not None:
        frame = frame[frame.scorer.isin(only)]
    failures = frame[frame.kind == "failure"]
    frame = frame[frame.cell != "tuning"]
    if not (frame.kind == "scorer").any():
        why = f"; the first of {len(failures)} that failed: {failures.iloc[0].error}" if len(failures) else ""
        raise ValueError(f"{rows_path} has no measurement of {', '.join(only) if only else 'a score'}{why}.")
    summary = evaluation_tables.scorer_summary(evaluation_tables.beside_oracles(frame))
    for setting in summary.setting.unique():
        one = summary[summary.setting == setting]
        print(f"\n### {setting}: KL to the unpruned model, nats per token "
              f"(1/tau {one.compression_ratio.median():.2f})\n")  # fmt: skip
        wide = evaluation_tables.wide_table(summary, setting)
        print(evaluation_tables.markdown(wide, bold_lowest=list(wide.columns[2:])))
        if one.answered_items.any():
            answered = one.groupby("cell", sort=False).answered_items.max()
            counts = ", ".join(f"{test_set} {n}" for test_set, n in answered.items() if n)
            print(f"\n{setting}: right answers, % of those that the unpruned model gets right ({counts})\n")
            kept = evaluation_tables.wide_table(one[one.answered_items > 0], setting, column="answers_kept_percent")
            print(evaluation_tables.markdown(kept, digits=1))
        changes = evaluation_tables.wide_table(summary, setting, column="perplexity_change_percent")
        print(f"\n{setting}: change of perplexity, %\n")
        print(evaluation_tables.markdown(changes, digits=2))
    learned = [name for name in frame.scorer.unique() if name.startswith(evaluation_tables.LEARNED_PREFIX)]
    for name in learned:
        differences = evaluation_tables.paired_differences(frame[frame.block == "deployable"], name)
        if differences.empty:
            continue
        print(f"\n### {name} minus each other score: KL, paired, 95 % bootstrap\n")
        print(evaluation_tables.markdown(differences, digits=4))
    if len(failures):
        print(f"\n{len(failures)} measurement(s) failed; the first: {failures.iloc[0].error}")
    figure = draw(summary, rows_path, frame)
    print(f"\nrows: {rows_path}\nfigure: {figure}")


def draw(summary, rows_path: Path, frame) -> Path:
    import matplotlib.pyplot as plt

    with plots.use_style():
        # Intervals of the means overlap by the samples' own spread; the paired table says what differs.
        deployable = summary[summary.block == "deployable"].drop(columns=["kl_nats_low", "kl_nats_high"])
        test_sets = list(deployable.cell.unique())
        columns = min(3, len(test_sets))
        lines = -(-len(test_sets) // columns)
        size = (5.2 * columns, 3.8 * lines + 0.9)
        figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
        for ax, test_set in zip(axes.flat, test_sets, strict=False):
            part = deployable[deployable.cell == test_set]
            plots.quality_over_flops(part, ax)
            ax.set_title(f"{test_set} (n = {part['items'].max()})")
            ax.set_xlim(0, 1)
        for ax in list(axes.flat)[len(test_sets) :]:
            ax.set_visible(False)
        plots.one_legend(axes.flat[: len(test_sets)])
        stamp = {name: frame[name].iloc[0] for name in ("commit", "model", "weights", "device", "dtype", "seed")}
        path = plots.save(figure, rows_path.with_name("quality_over_flops.png"), stamp | {"rows": rows_path.name})
        plt.close(figure)
    return path


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    rows_path, share = options.run_dir / "scorers.jsonl", Share()
    started = time.perf_counter()
    if not options.tables:
        with torch.inference_mode(False):
            measure(options, rows_path, share)
    if share.is_first:
        if not options.tables:
            print(f"{(time.perf_counter() - started) / 60:.1f} minutes")
        report(rows_path, options.scores)


if __name__ == "__main__":
    from sdtp_lib.checked import told

    sys.exit(told(main))
