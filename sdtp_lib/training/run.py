"""`train_pruners`: from a model and its tokenizer to measured pruners in a folder, by a recipe.

Prompts, labels, training, the choice of a blend, a table on held-out prompts, a model card. Labels, checkpoints and
measured rows are kept under the user's cache, so that a killed run goes on; under `accelerate launch` the work is
shared. The folder of the pruners is written whole, at the end, and never over another one unless ``force`` says so.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdtp_lib.config import PruningConfig
from sdtp_lib.data import training_mix
from sdtp_lib.data.samples import DOLLY
from sdtp_lib.files import refuse_existing, shown_path, whole_folder, write_json
from sdtp_lib.models import cache_directory, cpu_computes_bfloat16
from sdtp_lib.processes import Share
from sdtp_lib.provenance import adapters_fingerprint, content_id, fingerprint, provenance_of
from sdtp_lib.records import failures, read_rows
from sdtp_lib.scorers.token_pruners import TokenPruners
from sdtp_lib.shipped import folder_for
from sdtp_lib.training import trainer, verdict
from sdtp_lib.training.card import write_card
from sdtp_lib.training.fit import averaged, begun_from, trained
from sdtp_lib.training.labels import checked_labels
from sdtp_lib.training.prompts import choose_prompts, listed
from sdtp_lib.training.recipes import (
    DEFAULT,
    NothingMeasured,
    Recipe,
    choose_blend,
    held_back,
    joined_label,
    recipe_named,
    with_blend,
    with_evidence,
)  # fmt: skip
from sdtp_lib.training.saliency import compute_saliency

FIRST_LABELS = 6  # timed, before the time of a run is told
BLEND_RATIO = 0.8
# Of a sample: what its labels are made from.
_READ = ("prompt_ids", "response_ids", "own_tokens", "loss_mask", "evidence")
MEASURED_RUNS = 1 + len(verdict.RATIOS) * (1 + len(verdict.TRAINING_FREE))  # prefills per held-out prompt


def train_pruners(model: nn.Module, tokenizer: Any = None, data: Any = None, /, **options: Any) -> TokenPruners:
    """Train pruners for ``model``; two forms.

    ``train_pruners(model, tokenizer, data=None, **options)``: the whole recipe, as in `train_by_recipe`, on data of its
    own mixed with ``data`` (a JSON-lines file, or records). ``train_pruners(model, samples, config=None, **options)``:
    the training step alone on samples or labelled samples, as in `trainer.train_pruners`.
    """
    if tokenizer is not None and callable(tokenizer) and hasattr(tokenizer, "decode"):
        return train_by_recipe(model, tokenizer, data, **options)
    if data is not None:
        options["config"] = data
    samples = options.pop("samples", ()) if tokenizer is None else tokenizer
    return trainer.train_pruners(model, samples, **options)


def train_by_recipe(
    model: nn.Module,
    tokenizer: Any,
    data: Any = None,
    *,
    recipe: str | Recipe = DEFAULT,
    instructions: str = DOLLY,
    prompts: int = 480,
    prompt_tokens: tuple[int, int] = training_mix.LENGTHS,
    most_tokens: int = 4096,
    epochs: float | None = None,
    heldout: int = 24,
    layers: Sequence[int] | None = None,
    start: str | Path | None = None,
    start_share: float = 0.0,
    out: str | Path | None = None,
    force: bool = False,
    model_name: str | None = None,
    labels_only: bool = False,
    seed: int = 0,
    progress: bool = True,
    cache_dir: str | Path | None = None,
    asked: Mapping[str, Any] | None = None,
) -> TokenPruners | None:
    """Pruners for ``model`` by a named recipe, measured on held-out prompts and saved.

    Parameters
    ----------
    data
        A user's records: a JSON-lines file or an iterable of objects, in any form of `data.own_records`. They make up
        half of the labelled prompts at most; two in ten are held out and measured on. None: data of its own alone.
    recipe
        A name of `RECIPES`, or a `Recipe`.
    instructions
        Instruction records with contexts, part of the data of its own: Dolly from the Hub, a JSON-lines file in its
        fields, or ``"embedded"``, which also stands in where the Hub cannot be reached.
    prompts, prompt_tokens
        How many to label and train on, and their lengths, from and to; a recipe may add some with evidence.
    most_tokens
        Of a user's longer prompts the middle is left out.
    epochs
        Passes over the prompts; default the recipe's.
    heldout
        Held-out prompts per kind that the pruners are measured on; 0: not measured.
    layers
        Before which to prune, default ``range(4, L, 3)``.
    start, start_share
        Pruners to go on from, a folder or the name of shipped ones, of the recipe's inputs and sizes; default: anew.
        The result is an average of weights, ``start_share`` of it the start's: what the new prompts lack is not
        unlearned (arXiv 2109.01903).
    out, force
        Folder of the pruners, default the user's own (`shipped.folder_for`), where `token_pruning` finds them by the
        model's fingerprint; whether what is there may be replaced.
    model_name
        What the model is called in the card and the folder; default its own name.
    labels_only
        Stop when all prompts are labelled, and return None.
    cache_dir
        Of labels, checkpoints and rows; default the user's cache.
    asked
        What a caller wants to find again in ``training.json``.

    Returns
    -------
    TokenPruners
        In eval mode; ``.history`` has the logged losses, ``.verdict`` the `verdict.Line`s that were measured.

    Raises
    ------
    FileExistsError, ValueError, OSError, PruningNotSupported
        Before any compute: a folder that is there, an unknown recipe, data that cannot be used, a model that cannot be
        labelled.
    """
    share, chosen = Share(), recipe_named(recipe)
    say = print if share.is_first and progress else _silent
    if prompts < 1 or heldout < 0 or not 0 < prompt_tokens[0] <= prompt_tokens[1]:
        raise ValueError(f"prompts={prompts}, heldout={heldout}, prompt_tokens={prompt_tokens}: give 1 or more, 0 or "
                         "more, and a range such as (420, 1200).")  # fmt: skip
    marks = fingerprint(model)
    name = str(model_name or getattr(model, "name_or_path", "") or model.config.model_type)
    name = Path(name).resolve().name if Path(name).exists() else name  # no paths of this machine in a card
    out = Path(out) if out is not None else folder_for(name, marks)
    if not labels_only:
        refuse_existing(out, force)
    depth = model.config.get_text_config().num_hidden_layers
    layers = tuple(sorted(layers if layers is not None else range(4, depth, 3)))
    config = PruningConfig(layers=layers, keep_ratio=BLEND_RATIO)  # refuses no layers and layer 0
    if epochs is not None:
        chosen = dataclasses.replace(chosen, training=chosen.training.replace(epochs=epochs))
    steps = prompts * chosen.training.epochs / chosen.training.batch_size
    logged = max(1, min(chosen.training.logging_steps, int(steps / 20)))
    chosen = dataclasses.replace(chosen, training=chosen.training.replace(seed=seed, logging_steps=logged))
    if chosen.refinement is not None:
        chosen = dataclasses.replace(chosen, refinement=chosen.refinement.replace(seed=seed, logging_steps=logged))
    if chosen.evidence and start is None:
        say("evidence is meant for pruners to go on from (start=); these begin anew")
    checked_labels(model, layers, chosen.labels)
    if not 0 <= start_share < 1 or (start_share and start is None):
        raise ValueError(f"start_share={start_share} needs start= and a share in [0, 1).")
    begun = None if start is None else begun_from(start, model, layers, chosen)

    train, held_out, told = choose_prompts(
        tokenizer, data, instructions, prompts, prompt_tokens, most_tokens, heldout, seed, say, chosen.evidence
    )
    work = _work_folder(cache_dir, marks, model, layers, chosen, train, begun, start_share)
    fast = _fast_copy(model)
    say(f"labels in {str(fast.dtype).removeprefix('torch.')}; what is done is kept in {shown_path(work.parent.parent)}")
    measured = sum(map(len, held_out.values()))
    labelled = _labelled(fast, train, layers, chosen, share, cache_dir, say, progress, measured)
    del fast
    if labels_only:
        return None
    pruners = trained(model, labelled, layers, chosen, work, name, share, progress, seed, begun)
    if start_share:
        first = begun_from(start, model, layers, chosen).state_dict()
        pruners.load_state_dict(averaged(first, pruners.state_dict(), start_share))
        if share.is_first:
            pruners.save_pretrained(work / "pruners")
        share.wait()
    provenance = provenance_of(model, model_name=name, seed=seed, recipe=content_id(chosen.to_dict()))
    blends: dict[str, float] = {}
    if chosen.blends:
        tuned_on = held_back(labelled, chosen)
        say(f"blend: {len(chosen.blends)} candidates on {len(tuned_on)} of the training prompts", flush=True)
        blend, blends = choose_blend(
            model, work / "pruners", chosen.blends, tuned_on, config, work / "blends.jsonl", provenance, share
        )
        history, pruners = pruners.history, with_blend(work / "pruners", blend).to(model.device)
        pruners.history = history
        say(f"blend: {listed(blend)}")
        pruners.know_words(tokenizer)
    lines = []
    if heldout:
        say(
            f"measuring on held-out prompts: {listed({kind: len(samples) for kind, samples in held_out.items()})}",
            flush=True,
        )
        lines = verdict.measure(model, pruners, held_out, layers, work / "heldout.jsonl", provenance, share)
        if failed := failures(read_rows(work / "heldout.jsonl")):
            if not lines:
                raise NothingMeasured(f"no held-out prompt could be measured: {failed}")
            say(f"not all held-out prompts could be measured: {failed}")
        say(verdict.as_text(lines))
        say(verdict.in_words(lines), flush=True)
    pruners.verdict = lines
    share.wait()  # nobody reads rows any more
    if share.is_first:
        with whole_folder(out, force=force) as fresh:
            pruners.save_pretrained(fresh)
            facts = {**provenance, "recipe": chosen.to_dict(), "data": told, "blends": blends,
                     "asked": dict(asked or {}), "ids": [sample["id"] for sample in train]}  # fmt: skip
            write_json(fresh / "training.json", facts)
            write_json(fresh / "history.json", pruners.history)
            if lines:
                shutil.copy(work / "heldout.jsonl", fresh / "heldout.jsonl")
            named = recipe if isinstance(recipe, str) else "own"
            begun_from_what = "" if start is None else _begun(start, start_share)
            card = fresh / "README.md"
            write_card(card, name, named, chosen, layers, told, len(train), lines, provenance, begun_from_what)
        shutil.rmtree(work, ignore_errors=True)
    share.wait()
    say(f"saved to {shown_path(out)}")
    return pruners


def _begun(start: str | Path, share: float) -> str:
    averaged = f", whose weights are {share:g} of the average" if share else ""
    return f"Begun from the pruners `{Path(start).name}`{averaged}. "


def _silent(*_: Any, **__: Any) -> None:
    """Instead of `print`, in all processes of a launch but one."""


def _work_folder(
    cache_dir: Any,
    marks: str,
    model: nn.Module,
    layers: Sequence[int],
    recipe: Recipe,
    train: Sequence[dict],
    begun: TokenPruners | None,
    start_share: float,
) -> Path:
    """Where this very run keeps what it has done: another model, recipe or prompt is another run."""
    made_from = (
        *(() if begun is None else (begun.identity, start_share)),
        marks,
        adapters_fingerprint(model),
        layers,
        recipe.to_dict(),
        [[sample.get(name) for name in _READ] for sample in train],
        str(model.dtype),
    )
    return Path(cache_dir or cache_directory()) / "training" / content_id(*made_from)


def _fast_copy(model: nn.Module) -> nn.Module:
    """The model that labels: a bfloat16 copy on a CPU that computes in it, two to three times as fast."""
    if model.device.type == "cpu" and model.dtype == torch.float32 and cpu_computes_bfloat16():
        return copy.deepcopy(model).to(torch.bfloat16)
    return model


def _labelled(
    model: nn.Module,
    train: Sequence[dict[str, Any]],
    layers: Sequence[int],
    recipe: Recipe,
    share: Share,
    cache_dir: Any,
    say: Any,
    progress: bool,
    measured: int,
) -> Any:
    """All prompts labelled by all processes, but those with evidence; tells the expected time after the first ones."""
    known = [sample for sample in train if "evidence" in sample]
    train = [sample for sample in train if "evidence" not in sample]
    # A batch with evidence in it runs the model for its inputs.
    store = not known and _fits_on_disk(model, train, layers, cache_dir)
    about = {"label": recipe.labels, "cache_dir": cache_dir, "store_hidden": store}
    first = share.of(train)[:FIRST_LABELS]
    started = time.perf_counter()
    compute_saliency(model, first, layers, progress=False, **about)
    seconds = time.perf_counter() - started
    tokens = sum(len(sample["prompt_ids"]) for sample in share.of(train)[FIRST_LABELS:])
    left = seconds * tokens / sum(len(sample["prompt_ids"]) for sample in first)
    # A label is a forward and two backwards; a pruned prefill, to measure on held-out prompts, is less than a forward.
    measuring = MEASURED_RUNS * measured / share.count * seconds / len(first) * 0.15
    then = f", and very roughly {measuring / 60:.0f} for measuring on {measured} held-out prompts" if measured else ""
    say(f"first {len(first)} labels: {seconds:.0f} s; about {left / 60:.0f} minutes for the others{then}", flush=True)
    compute_saliency(model, share.of(train), layers, progress=progress and share.is_first, **about)
    share.wait()
    labelled = compute_saliency(model, train, layers, progress=False, **about)
    joined = {"layers": layers, "labels": recipe.labels, "smoothing": recipe.smoothing}
    return with_evidence(labelled.map(joined_label, fn_kwargs=joined, desc="joined labels"), known)


def _fits_on_disk(model: nn.Module, train: Sequence[dict], layers: Sequence[int], cache_dir: Any) -> bool:
    """Whether hidden states may be kept with the labels; else each training step runs the model for them."""
    folder = Path(cache_dir or cache_directory())
    folder.mkdir(parents=True, exist_ok=True)
    tokens = sum(len(sample["prompt_ids"]) for sample in train)
    needed = 2 * tokens * len(layers) * model.config.get_text_config().hidden_size
    return needed < shutil.disk_usage(folder).free / 2
