"""The paper's Tables 4 and 5 and our own: pruners trained without one loss or one input, compared at the same budget.

    python benchmarks/ablations.py --dolly dolly-15k.jsonl                    # train each recipe, then KL by test set
    python benchmarks/ablations.py --dolly PATH --fewshot FOLDER --limit 100  # and 5-shot accuracy (Table 4)
    python benchmarks/ablations.py --dolly PATH --longbench FOLDER            # and LongBench (Table 5)

Recipes are those of `sdtp_lib.training.recipes`; all of ours share one label pass, the paper's has its own. What is
already, as asked for, is not trained again; rows resume. On 2 cores: 20 minutes of labels each, 3 minutes per recipe,
then comparing.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from sdtp_lib.commands.arguments import count
from sdtp_lib.records import project_root
from sdtp_lib.training.recipes import RECIPES

HERE = Path(__file__).resolve().parent
PAPER_TABLE4 = "without rank: -0.55, without rank and MSE: -0.89 points (Llama-2-7B, mean of 4 tasks; not this model)"


def recipes() -> list[str]:
    """The names of the library's recipes."""
    return list(RECIPES)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dolly", required=True, help="Dolly-15k: a JSON-lines file or a Hub data set")
    parser.add_argument("--recipes", nargs="+", choices=recipes(),
                        default=[name for name, each in RECIPES.items() if not each.refinement and not each.evidence],
                        help="default: all but those that go on from others")  # fmt: skip
    parser.add_argument("--prompts", type=count, default=180, help="labelled prompts to train on")
    parser.add_argument("--epochs", type=float, default=10.0)
    parser.add_argument("--samples", type=count, default=6, help="held-out prompts per test set")
    parser.add_argument("--test-sets", nargs="+",
                        default=["text", "needle", "multi_doc_qa", "instructions"], help="test sets")  # fmt: skip
    parser.add_argument("--settings", nargs="+", default=["r=0.8"])
    parser.add_argument("--fewshot", default=None, help="folder of the 5-shot tasks")
    parser.add_argument("--limit", type=count, default=100, help="items a 5-shot task")
    parser.add_argument("--longbench", default=None, help="folder or data.zip of LongBench")
    parser.add_argument("--run-dir", type=Path, default=project_root() / "data" / "results" / "ablations")
    return parser.parse_args(arguments)


def is_trained(folder: Path, recipe: str, options: argparse.Namespace) -> bool:
    """Whether the folder's pruners are there; those of another recipe, data or number of passes are refused by name."""
    facts = folder / "training.json"
    if not facts.is_file():
        return False
    there = json.loads(facts.read_text(encoding="utf-8")).get("asked", {})
    asked = {"recipe": recipe, "dolly": options.dolly, "prompts": options.prompts, "epochs": options.epochs}
    other = [f"{name} {there.get(name)!r} (asked: {v!r})" for name, v in asked.items() if there.get(name) != v]
    if other:
        raise ValueError(
            f"{folder.name} holds pruners trained with {', '.join(other)}: give this run a folder of its own "
            "(--run-dir), or move that one away."
        )
    return True


def call(script: str, *arguments: object) -> None:
    """One of the other commands, its output passed on; ends with its exit code if it fails, which it has said why."""
    ended = subprocess.run([sys.executable, str(HERE / script), *map(str, arguments)], check=False)
    if ended.returncode:
        raise SystemExit(ended.returncode)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    named = []
    for recipe in options.recipes:
        slug = re.sub(r"\W+", "-", recipe)
        folder = options.run_dir.resolve() / slug
        if not is_trained(folder, recipe, options):
            print(f"\n=== training: {recipe}", flush=True)
            call("train_embedded.py", "--dolly", options.dolly, "--recipe", recipe, "--prompts", options.prompts,
                 "--epochs", options.epochs, "--out", folder)  # fmt: skip
        named.append(f"SDTP {recipe}={folder}")
    print("\n=== KL to the unpruned model", flush=True)
    pruners = [part for name in named for part in ("--pruners", name)]
    recipes_only = [name.partition("=")[0] for name in named]
    call("scorers.py", *pruners, "--scores", *recipes_only, "--prompts", options.samples, "--oracle-prompts", 0,
         "--lengths", 1024, "--settings", *options.settings, "--test-sets", *options.test_sets,
         "--run-dir", options.run_dir)  # fmt: skip
    if options.fewshot:
        print(f"\n=== 5-shot accuracy; the paper's Table 4 says {PAPER_TABLE4}", flush=True)
        call("fewshot.py", "--data", options.fewshot, "--limit", options.limit, "--pruners", *named,
             "--run-dir", options.run_dir)  # fmt: skip
    if options.longbench:
        print("\n=== LongBench", flush=True)
        call("longbench.py", "--data", options.longbench, "--datasets", "english", "--presets", "keep09",
             "--scorers", *named, "--run-dir", options.run_dir)  # fmt: skip


if __name__ == "__main__":
    from sdtp_lib.checked import told

    sys.exit(told(main))
