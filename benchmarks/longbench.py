"""LongBench v1 by its official protocol, full and pruned, one row per item, resumable.

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

from sdtp_lib.commands.arguments import count
from sdtp_lib.data import longbench
from sdtp_lib.evaluation.answer_run import (
    Part,
    add_arguments,
    load,
    measured,
    print_failures,
    refuse_failures_alone,
    run_parts,
)
from sdtp_lib.evaluation.answer_tables import answers_table
from sdtp_lib.evaluation.answers import FULL
from sdtp_lib.evaluation.items import longbench_items
from sdtp_lib.evaluation.tables import markdown
from sdtp_lib.model_shape import positions
from sdtp_lib.paper import TABLE1
from sdtp_lib.processes import Share

CHAT_TOKENS = 64
# Of a model whose configuration says none.
UNSAID_POSITIONS = 8192


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "longbench", presets=["keep09", "keep08", "keep07"])
    parser.add_argument("--data", default="hub", help="folder of <dataset>.jsonl, the official data.zip, or hub")
    parser.add_argument("--datasets", nargs="+", default=["paper"])
    parser.add_argument("--limit", type=count, default=None, help="the first so many items by _id")
    parser.add_argument(
        "--max-tokens", type=count, default=None, help="official truncation; default: what the model takes"
    )
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, path: Path, share: Share) -> None:
    datasets = longbench.resolve(options.datasets)
    model, tokenizer = load(options, share)
    room = positions(model) or UNSAID_POSITIONS

    def part(dataset: str) -> Part:
        most = options.max_tokens or room - longbench.task(dataset).max_new_tokens - CHAT_TOKENS
        return Part(
            dataset,
            lambda: longbench.read_records(options.data, dataset)[: options.limit],
            lambda records: longbench_items(records, tokenizer, max_tokens=most),
        )

    run_parts(options, path, share, model, tokenizer, map(part, datasets))


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    path = options.run_dir / "longbench.jsonl"
    frame = measured(options, path, measure)
    if frame is None:
        return
    refuse_failures_alone(frame)
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
    print_failures(frame)
    print(f"rows: {path}")


if __name__ == "__main__":
    from sdtp_lib.checked import told

    sys.exit(told(main))
