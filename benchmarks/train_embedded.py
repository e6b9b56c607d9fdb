"""Train the pruners that ship for the embedded model: ``python benchmarks/train_embedded.py --dolly PATH``.

The recipe, its prompts and the comparison at the end are the library's (`sdtp_lib.training`); this is
``python -m sdtp_lib train embedded`` with the study's folders, and with the set that ships as a possible target:

    torchrun --nproc-per-node 2 benchmarks/train_embedded.py --dolly PATH --labels-only

(`accelerate launch` starts one process where there is no GPU; `torchrun` takes ``--start`` for its own, so give it
afterwards, in one process.)

The set is written to ``--out``, whole or not at all; the set that ships is only replaced when ``--replace-shipped``
says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from sdtp_lib import load_model
from sdtp_lib.commands.arguments import amount, count
from sdtp_lib.data.samples import DOLLY
from sdtp_lib.data.training_mix import LENGTHS
from sdtp_lib.processes import Share
from sdtp_lib.records import project_root
from sdtp_lib.shipped import shipped_for, shipped_pruners
from sdtp_lib.training.recipes import DEFAULT, RECIPES
from sdtp_lib.training.run import train_by_recipe


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dolly", default=DOLLY, help="Dolly-15k: a JSON-lines file or a Hub data set")
    parser.add_argument("--prompts", type=count, default=480, help="how many to label and train on")
    parser.add_argument("--prompt-tokens", type=count, nargs=2, metavar=("FROM", "TO"), default=LENGTHS)
    parser.add_argument("--epochs", type=float, help="passes over the prompts; default: the recipe's")
    parser.add_argument("--heldout", type=amount, default=0, help="held-out prompts per kind to measure on")
    parser.add_argument("--recipe", choices=list(RECIPES), default=DEFAULT, help="labels, inputs and losses")
    parser.add_argument("--start", help="pruners to go on from: a folder, or the name of shipped ones; default: anew")
    parser.add_argument("--start-share", type=float, default=0.0, help="share of --start in the averaged weights")
    parser.add_argument("--learning-rate", type=float, help="default: the recipe's")
    parser.add_argument("--first-blend", action="store_true", help="the recipe's first blend instead of the best")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, order, ratios and weights")
    parser.add_argument("--labels-only", action="store_true", help="label and stop")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--out", default="data/results/train-embedded/set", help="folder of the trained set")
    target.add_argument("--replace-shipped", action="store_true", help="write over the pruners that ship instead")
    parser.add_argument("--force", action="store_true", help="replace what is in --out")
    given = parser.parse_args(arguments)
    model, tokenizer = load_model(device=Share().device)
    out = shipped_pruners()[shipped_for("embedded")] if given.replace_shipped else project_root() / given.out
    fields = ("recipe", "prompts", "prompt_tokens", "epochs", "start", "start_share", "learning_rate", "first_blend")
    asked = {name: getattr(given, name) for name in fields}
    recipe = RECIPES[given.recipe]
    if given.learning_rate:
        recipe = recipe.changed("training", learning_rate=given.learning_rate)
    if given.first_blend:
        recipe = dataclasses.replace(recipe, blends=recipe.blends[:1])
    train_by_recipe(
        model, tokenizer, recipe=given.recipe if recipe == RECIPES[given.recipe] else recipe,
        instructions=given.dolly, prompts=given.prompts, prompt_tokens=tuple(given.prompt_tokens),
        epochs=given.epochs, heldout=given.heldout, start=given.start, start_share=given.start_share, out=out,
        force=given.force or given.replace_shipped, seed=given.seed,
        model_name="HuggingFaceTB/SmolLM2-135M-Instruct", labels_only=given.labels_only, asked=asked,
    )  # fmt: skip


if __name__ == "__main__":
    from sdtp_lib.checked import told

    sys.exit(told(main))
