"""LongBench v1 by its official protocol, full and pruned, an item a row, resumable.

    python benchmarks/longbench.py --data FOLDER --datasets multi_news --limit 40 --presets keep09 keep07
    python benchmarks/longbench.py --model Qwen/Qwen2-7B-Instruct --dtype bfloat16 --data hub --datasets paper \\
        --presets keep09 --scorers SDTP=DIR recency attention

``--datasets`` takes names and the sets all, english, paper (its 14), eight, longbench-e. Prints scores with paired
bootstrap intervals; a run that was stopped goes on with the same command. On several GPUs, a copy of the model on each:

    accelerate launch --num_processes 4 benchmarks/longbench.py --model Qwen/Qwen2-7B-Instruct --datasets paper
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas
from tqdm import tqdm

from sdtp_lib import PruningConfig, load_model
from sdtp_lib.data import longbench
from sdtp_lib.evaluation.answer_tables import answers_table
from sdtp_lib.evaluation.answers import FULL, Variant, run_items
from sdtp_lib.evaluation.items import longbench_items
from sdtp_lib.evaluation.tables import markdown
from sdtp_lib.paper import TABLE1
from sdtp_lib.processes import Share
from sdtp_lib.records import passport, project_root, read_frame
from sdtp_lib.scorers.by_name import SIMPLE, scorer_named

CHAT_TOKENS = 64


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--device-map", default=None)
    parser.add_argument("--data", default="hub", help="folder of <dataset>.jsonl, the official data.zip, or hub")
    parser.add_argument("--datasets", nargs="+", default=["paper"])
    parser.add_argument("--limit", type=int, default=None, help="the first so many items by _id")
    parser.add_argument("--presets", nargs="*", default=["keep09", "keep08", "keep07"])
    parser.add_argument("--scorers", nargs="+", type=scorer_named, default=None, metavar="NAME[=DIR]",
                        help=f"SDTP (default), NAME=DIR, {', '.join(SIMPLE)}")  # fmt: skip
    parser.add_argument(
        "--max-tokens", type=int, default=None, help="official truncation; default: what the model takes"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="prompts a batch; times are then of whole batches")
    parser.add_argument("--run-dir", type=Path, default=project_root() / "data" / "results" / "longbench")
    parser.add_argument("--tables", action="store_true", help="print the rows that are there, compute nothing")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, path: Path, share: Share) -> None:
    datasets = longbench.resolve(options.datasets)
    if share.count > 1 and options.device_map:
        raise SystemExit("--device-map spreads one model over all devices: not with several processes.")
    model, tokenizer = load_model(
        options.model, dtype=options.dtype, device=share.device, device_map=options.device_map
    )
    layers = model.config.num_hidden_layers
    chosen = [(named.name, named.load(model)) for named in options.scorers or [scorer_named("SDTP")]]
    variants = [Variant(FULL)] + [
        Variant(f"{name} {preset}", PruningConfig.preset(preset, num_layers=layers), scorer)
        for preset in options.presets
        for name, scorer in chosen
    ]
    positions = getattr(model.config, "max_position_embeddings", None) or 8192
    stamp = passport(model, model_name=options.model)
    with share.rows(path, stamp) as writer:
        for dataset in datasets:
            try:
                records = longbench.read_records(options.data, dataset)[: options.limit]
            except OSError as error:
                print(f"{dataset} is left out: {error}", file=sys.stderr)
                continue
            records = share.of(records)
            most = options.max_tokens or positions - longbench.task(dataset).max_new_tokens - CHAT_TOKENS
            bar = tqdm(total=len(records), desc=dataset, unit="item", mininterval=5, disable=not share.is_first)
            items = longbench_items(records, tokenizer, max_tokens=most)
            run_items(
                model, tokenizer, items, variants, writer, batch_size=options.batch_size,
                progress=lambda item, bar=bar: bar.update(),
            )  # fmt: skip
            bar.close()


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    path = options.run_dir / "longbench.jsonl"
    share = Share()
    if not options.tables:
        measure(options, path, share)
    if not share.is_first:
        return
    frame = read_frame(path)
    print("\nScores (official metric, x 100), paired difference to full with its 95 % bootstrap interval\n")
    print(markdown(answers_table(frame, against=FULL), digits=2))
    full = frame[(frame.kind == "item") & (frame.variant == FULL)].groupby("dataset").score.mean()
    if set(longbench.PAPER_14) <= set(full.index):
        for variant, part in frame[frame.kind == "item"].groupby("variant", sort=False):
            print(f"AVG (14 data sets) {variant}: {100 * longbench.average(part.groupby('dataset').score.mean()):.2f}")
    # Never beside another model's figures as if they compared.
    if "Mistral-7B-Instruct-v0.2" in str(frame.model.iloc[0]):
        print("\nThe paper's Table 1, the same model:\n")
        print(markdown(pandas.DataFrame({"method": name} | row for name, row in TABLE1.items()), digits=2))
    failures = frame[frame.kind == "failure"]
    for row in failures.itertuples():
        print(f"failed: {row.dataset} {row.item} {row.variant}: {row.error}")
    print(f"rows: {path}")


if __name__ == "__main__":
    main()
