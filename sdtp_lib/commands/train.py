"""``train``: token pruners for a model, by a recipe, on a user's own records or on prompts that come along; a door to
`training.run`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdtp_lib.commands import arguments as shared
from sdtp_lib.data.samples import DOLLY
from sdtp_lib.data.training_mix import LENGTHS

# Names of `training.recipes.RECIPES`, which loads torch; the first is its default.
RECIPES = (
    "sdtp", "paper", "sdtp, refined", "sdtp, on evidence", "sdtp, hidden alone", "sdtp, without attention",
    "sdtp, without passages", "sdtp, without memory", "sdtp, whole prompts", "sdtp, without rank",
    "sdtp, without rank and mse",
)  # fmt: skip


def parser(prog: str = "python -m sdtp_lib train") -> argparse.ArgumentParser:
    """The arguments of the command."""
    made = shared.parser_of(
        prog,
        "Train token pruners for a model, measure them on held-out prompts and save them where token_pruning finds "
        "them. A killed run goes on where it stopped when the same command is given again. Several GPUs: accelerate "
        "launch -m sdtp_lib train MODEL ...; several processes on a CPU: torchrun --nproc-per-node 2 -m sdtp_lib train "
        "MODEL ... (labels are made without --start, which torchrun takes for its own; add it afterwards, in one "
        "process).",
    )
    shared.add_model(made)
    made.add_argument("--data", type=Path, metavar="FILE.jsonl", help="your own records, one per line: prompt and "
                      "response, instruction (with or without context) and response, or messages")  # fmt: skip
    made.add_argument("--out", type=Path, metavar="DIR", help="folder of the pruners; default: your folder of pruners "
                      "(SDTP_PRUNERS), named after the model and its weights")  # fmt: skip
    made.add_argument("--force", action="store_true", help="replace what is in that folder")
    made.add_argument(
        "--recipe",
        choices=RECIPES,
        default=RECIPES[0],
        metavar="NAME",
        help=f"labels, inputs and losses: one of {'; '.join(RECIPES)}",
    )
    made.add_argument("--instructions", default=DOLLY, metavar="SOURCE", help="instruction records with contexts: a "
                      "Hub data set or a JSON-lines file in Dolly's fields, or 'embedded'")  # fmt: skip
    made.add_argument("--prompts", type=int, default=480, help="how many to label and train on, yours included")
    made.add_argument("--prompt-tokens", type=int, nargs=2, default=LENGTHS, metavar=("FROM", "TO"),
                      help="lengths of prompts")  # fmt: skip
    made.add_argument("--most-tokens", type=int, default=4096, help="of your longer prompts the middle is left out")
    made.add_argument("--epochs", type=float, help="passes over the prompts; default: the recipe's")
    made.add_argument("--heldout", type=int, default=24, help="held-out prompts per kind to measure on; 0: do not")
    made.add_argument("--layers", type=int, nargs="+", help="before which to prune; default: every third from layer 4")
    made.add_argument("--start", metavar="PRUNERS", help="go on from these: a folder, or the name of shipped ones")
    made.add_argument("--start-share", type=float, default=0.0, metavar="SHARE", help="share of --start in the "
                      "averaged weights that come out, such as 0.5 with --recipe 'sdtp, on evidence'")  # fmt: skip
    made.add_argument("--seed", type=int, default=0, help="of prompts, order and weights")
    made.add_argument("--labels-only", action="store_true", help="stop when all prompts are labelled")
    return made


def main(arguments: Sequence[str] | None = None, prog: str = "python -m sdtp_lib train") -> int:
    """Run the command; 0: pruners were saved, or labels made."""
    given = parser(prog).parse_args(arguments)
    from sdtp_lib.processes import Share
    from sdtp_lib.training.run import train_by_recipe

    given.device = _device(given.device, Share().device)
    model, tokenizer = shared.load(given)
    train_by_recipe(
        model, tokenizer, given.data, recipe=given.recipe, instructions=given.instructions, prompts=given.prompts,
        prompt_tokens=tuple(given.prompt_tokens), most_tokens=given.most_tokens, epochs=given.epochs,
        heldout=given.heldout, layers=given.layers, start=given.start, start_share=given.start_share,
        out=given.out, force=given.force, labels_only=given.labels_only, seed=given.seed,
    )  # fmt: skip
    return 0


def _device(asked: str | None, of_process: Any) -> Any:
    """Where the model goes: the launcher's choice for this process, if there is a launcher, else what was asked."""
    if asked is not None and of_process is not None and asked != str(of_process):
        raise ValueError(f"--device {asked}: this process of a launch has {of_process}; leave the option out.")
    return of_process if of_process is not None else asked
