"""The paper's Table 3: eight 5-shot tasks through lm-eval, full and pruned, offline, one row per item, resumable.

    python benchmarks/fewshot.py --data ../shared/data/fewshot --limit 200
    python benchmarks/fewshot.py --model mistralai/Mistral-7B-v0.1 --dtype bfloat16 --data FOLDER --pruners DIR

Prints accuracy with paired bootstrap intervals, and the log-likelihood margin of the right choice: near chance,
accuracy is noise and the margin still tells whether pruning moved anything.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas
from tqdm import tqdm

from sdtp_lib import load_model
from sdtp_lib.architectures import num_layers
from sdtp_lib.commands.arguments import amount, count, method_of
from sdtp_lib.config import PRESETS, typed_budget
from sdtp_lib.evaluation.answer_run import budget_argument, print_failures, refuse_failures_alone
from sdtp_lib.evaluation.answer_tables import fewshot_table
from sdtp_lib.evaluation.fewshot import TASKS, local_task, run_task
from sdtp_lib.evaluation.tables import markdown, rows_in
from sdtp_lib.harness import SDTPLM
from sdtp_lib.methods.call import budget_for
from sdtp_lib.records import RowWriter, project_root, provenance_of
from sdtp_lib.scorers.by_name import loaded, scorer_named
from sdtp_lib.scorers.simple import NAMED

# Table 3 of arXiv 2504.04514, full -> SDTP; printed only beside the same model.
PAPER = {"Llama-2-7b": (58.62, 59.88), "Mistral-7B": (71.39, 71.24), "bloom-7b1": (54.03, 53.90)}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--device-map", default=None)
    parser.add_argument("--data", type=Path, default=project_root().parent / "shared" / "data" / "fewshot")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--limit", type=count, default=200, help="items per task")
    parser.add_argument("--shots", type=amount, default=5)
    parser.add_argument("--presets", nargs="+", type=budget_argument, default=["keep09"], metavar="BUDGET",
                        help=f"{', '.join(PRESETS)}, a speed-up such as 2x, or a keep ratio such as 0.8")  # fmt: skip
    parser.add_argument("--pruners", nargs="*", type=scorer_named, default=None, metavar="NAME[=DIR]",
                        help="learned pruners; default SDTP, the shipped set; no value: none")  # fmt: skip
    parser.add_argument("--scorers", nargs="*", default=[], choices=tuple(NAMED))
    parser.add_argument("--method", nargs="+", type=method_of, default=[], metavar="NAME",
                        help="published methods too, as NAME (its paper's budget) or NAME@2x")  # fmt: skip
    parser.add_argument("--batch-size", type=count, default=1)
    parser.add_argument("--run-dir", type=Path, default=project_root() / "data" / "results" / "fewshot")
    parser.add_argument("--tables", action="store_true", help="print the rows that are there, compute nothing")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, path: Path) -> None:
    model, tokenizer = load_model(options.model, dtype=options.dtype, device_map=options.device_map)
    shared = {"pretrained": model, "tokenizer": tokenizer, "batch_size": options.batch_size}
    pruners = [scorer_named("SDTP")] if options.pruners is None else options.pruners
    named = [*pruners, *map(scorer_named, options.scorers)]
    chosen = loaded(named, model)
    if not chosen and not options.method:
        raise ValueError("neither --pruners nor --scorers nor --method: name one of them.")
    models = {"full": SDTPLM(**shared)}
    for preset in options.presets:
        budget = budget_for(typed_budget(preset), num_layers(model))
        models |= {f"{name} {preset}": SDTPLM(**shared, pruning=budget, scorer=s) for name, s in chosen.items()}
    models |= {name: SDTPLM(**shared, method=name) for name in options.method}
    with RowWriter(path, provenance_of(model, model_name=options.model)) as writer:
        for name in options.tasks:
            try:
                task = local_task(name, options.data, shots=options.shots)
            except OSError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                continue
            bar = tqdm(desc=name, unit="item", mininterval=5)
            run_task(task, models, writer, limit=options.limit, progress=lambda text, bar=bar: bar.update())
            bar.close()


def shots_of(frame: pandas.DataFrame) -> str:
    """How many examples stood before each item, such as ``5-shot``; ``few-shot`` for older rows, which do not say."""
    found = sorted(frame.shots.dropna().astype(int).unique()) if "shots" in frame else []
    return f"{' and '.join(f'{shots}-' for shots in found).removesuffix('-') or 'few'}-shot"


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    path = options.run_dir / "fewshot.jsonl"
    if not options.tables:
        measure(options, path)
    frame = rows_in(path)
    refuse_failures_alone(frame)
    print(f"\n{shots_of(frame)} accuracy x 100; difference to full, paired, 95 % bootstrap; margin in nats\n")
    print(markdown(fewshot_table(frame), digits=2))
    for name, (full, pruned) in PAPER.items():
        if name.lower() in str(frame.model.iloc[0]).lower():
            print(f"\nThe paper's mean over the eight tasks for {name}: full {full}, SDTP {pruned} (65 % pruned)")
    print_failures(frame)
    print(f"rows: {path}")


if __name__ == "__main__":
    from sdtp_lib.checked import told

    sys.exit(told(main))
