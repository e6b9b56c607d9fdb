"""Choose the weights of a `Blend` on training-side samples, and write them into a folder of pruners.

    python benchmarks/tune_blend.py smollm2-135m-instruct --dry-run               # about 10 minutes on 2 cores
    python benchmarks/tune_blend.py DIR --learned 1 2 --recency 0.3

Candidates are compared by KL to the unpruned model on text, long-context tasks and instructions (never held-out ones):
a geometric mean over groups and presets, so that none outweighs another. One row per candidate and sample; runs resume.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from sdtp_lib import PruningConfig, evaluation, load_model
from sdtp_lib.architectures import num_layers
from sdtp_lib.commands.arguments import count
from sdtp_lib.config import PRESETS
from sdtp_lib.data.tasks import TASKS
from sdtp_lib.data.test_sets import samples_of
from sdtp_lib.evaluation.tables import rows_in
from sdtp_lib.records import RowWriter, project_root, provenance_of
from sdtp_lib.shipped import pruners_folder, shipped_pruners
from sdtp_lib.training.recipes import with_blend

GROUPS = {"text": ("text",), "tasks": tuple(TASKS), "instructions": ("instructions",)}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pruners", help="a folder, whose config.json gets the blend, or pruners that ship")
    parser.add_argument("--model", default="embedded", help="embedded, a folder or a Hub id")
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=["keep08", "keep07"],
                        help="at which candidates are compared")  # fmt: skip
    parser.add_argument("--learned", type=float, nargs="+", default=[2.0, 4.0])
    parser.add_argument("--attention", type=float, nargs="+", default=[1.0])
    parser.add_argument("--recency", type=float, nargs="+", default=[0.5])
    parser.add_argument("--floor", type=float, nargs="+", default=[0.0], help="where the learned part begins to count")
    parser.add_argument("--smoothing", type=count, nargs="+", default=[3, 5])
    parser.add_argument("--prompt-tokens", type=count, default=1024)
    parser.add_argument("--samples", type=count, default=10, help="a group: text, tasks (spread over them), "
                        "instructions")  # fmt: skip
    parser.add_argument("--seed", type=int, default=7, help="of the samples; 0 and 1 are what training drew with")
    parser.add_argument("--run-dir", type=Path, default=project_root() / "data" / "results" / "blend")
    parser.add_argument("--dry-run", action="store_true", help="print the winner, leave the folder as it is")
    parser.add_argument("--replace-shipped", action="store_true", help="allow to write into pruners that ship")
    options = parser.parse_args(arguments)
    folder = pruners_folder(options.pruners)
    if folder is None:
        parser.error(f"no pruners in {options.pruners!r}: give a folder, or one of {', '.join(shipped_pruners())}.")
    if folder.resolve() in shipped_pruners().values() and not (options.dry_run or options.replace_shipped):
        parser.error(f"{folder.name} ships with the library: give --dry-run, --replace-shipped, or a copy's folder.")
    options.pruners = folder
    return options


def write_blend(folder: Path, blend: dict) -> None:
    """Put ``blend`` into the folder's config.json, through a temporary name."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"blend": blend}
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    fresh.replace(path)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    model, tokenizer = load_model(options.model)
    layers = num_layers(model)
    configs = {preset: PruningConfig.preset(preset, num_layers=layers) for preset in options.presets}
    grid = itertools.product(options.learned, options.attention, options.recency, options.floor, options.smoothing)
    fields = ("learned", "attention", "recency", "floor", "smoothing")
    blends = [dict(zip(fields, values, strict=True)) for values in grid]
    methods = [
        evaluation.Variant(json.dumps(blend), scorer=with_blend(options.pruners, blend).to(model.device))
        for blend in blends
    ]
    stamp = provenance_of(model, model_name=options.model, seed=options.seed)
    with RowWriter(options.run_dir / "blend.jsonl", stamp) as writer:
        for group, test_sets in GROUPS.items():
            each = max(1, options.samples // len(test_sets))
            for test_set in tqdm(test_sets, desc=group, unit="set"):
                samples = samples_of(
                    test_set, tokenizer, prompt_tokens=options.prompt_tokens, count=each, seed=options.seed,
                    split="train",
                )  # fmt: skip
                with torch.inference_mode(False):
                    evaluation.compare_scorers(model, samples, configs, methods, writer, test_set=group)
        rows = rows_in(writer.path)
    # The file may hold other presets, too: they choose nothing here.
    asked = rows.scorer.isin([method.name for method in methods]) & rows.setting.isin(configs)
    failed, rows = rows[asked & (rows.kind == "failure")], rows[asked & (rows.kind == "scorer")]
    if rows.empty:
        raise ValueError(f"no candidate could be measured: {failed.iloc[0].error if len(failed) else 'no samples'}.")
    table = rows.pivot_table(index="scorer", columns=["setting", "cell"], values="kl_nats", aggfunc="mean")
    means = table.map(math.log).mean(axis=1).map(math.exp)
    table["geometric mean", ""] = means
    print(table.loc[means.sort_values().index].round(4).to_string())
    best = json.loads(means.idxmin())
    print(f"best at {', '.join(options.presets)}: {best}")
    if not options.dry_run:
        write_blend(options.pruners, best)
        print(f"written to {options.pruners / 'config.json'}")


if __name__ == "__main__":
    from sdtp_lib.checked import told

    sys.exit(told(main))
