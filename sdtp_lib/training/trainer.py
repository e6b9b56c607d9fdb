"""Stage 2: pruners from labelled samples, on transformers' `Trainer`.

The language model is frozen, is never saved and takes no weight gradient: checkpoints hold the pruners only. Labels
come from `saliency`, keyed by sample id; what a step computes, `step` knows.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainingArguments

from sdtp_lib.extras import extra
from sdtp_lib.provenance import content_id, fingerprint
from sdtp_lib.records import write_json
from sdtp_lib.scorers.token_pruners import TokenPruners
from sdtp_lib.training.config import TrainingConfig
from sdtp_lib.training.labels import DEFAULT_LABEL
from sdtp_lib.training.saliency import compute_saliency
from sdtp_lib.training.step import Collator, PrunerLoss

if TYPE_CHECKING:
    from datasets import Dataset

_RUN_FILE = "run.json"  # beside the checkpoints: which run they are of
_ENDED = "ended"  # what a run that has ended gave; a caller may write other pruners over its "pruners"


def train_pruners(
    model: nn.Module,
    samples: Sequence[dict[str, Any]] | Dataset,
    config: TrainingConfig | None = None,
    *,
    layers: Sequence[int] | None = None,
    pruners: TokenPruners | None = None,
    tokenizer: Any | None = None,
    label: str = DEFAULT_LABEL,
    loss_on: str = "response",
    output_dir: str | Path = "runs/pruners",
    cache_dir: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
    label_batch_size: int = 1,
    **pruner_options: Any,
) -> TokenPruners:
    """Train pruners for ``model``.

    Parameters
    ----------
    samples
        Samples (`compute_saliency` labels them first, cached), or a data set that it returned.
    layers
        Where to prune; default those of ``pruners``, else the labelled ones, else ``range(4, L, 3)``.
    pruners
        Pruners to go on with; default new ones, made with ``pruner_options`` (``features=...``).
    output_dir
        Checkpoints, at the end the pruners under ``output_dir/pruners`` and the logged losses in ``history.json``. A
        checkpoint found there is resumed if ``resume``, and only by a run of the same config, layers, pruners, model
        and samples; a run that has ended there is read, not trained further. Under `accelerate launch` or
        `notebook_launcher` one process writes.

    Returns
    -------
    TokenPruners
        In eval mode, the best on the held-out samples if some are held out. ``.history`` has the logged losses.

    Raises
    ------
    ValueError
        For no samples, samples without labels at a wanted layer, mixed precision without a GPU, or checkpoints in
        ``output_dir`` of another run (naming what differs).
    FloatingPointError
        If a loss is not a finite number, at the step where it is.
    RuntimeError
        If no loss reaches the pruners of a stage, at the first step.
    """
    with extra("train"):  # before any compute; the trainer itself needs accelerate
        importlib.import_module("accelerate")
        from datasets import Dataset
    config = config or TrainingConfig()
    if config.mixed_precision != "no" and model.device.type == "cpu":
        raise ValueError(
            f"mixed_precision={config.mixed_precision!r} needs a GPU, and the model is on the CPU: give 'no', or move "
            "the model."
        )
    if not len(samples):
        raise ValueError("samples is empty: give at least one labelled sample.")
    labelled = samples if isinstance(samples, Dataset) else None
    if layers is None:
        text = model.config.get_text_config()
        found = sorted(int(name[6:]) for name in labelled.column_names if name[6:].isdigit()) if labelled else []
        layers = pruners.layers if pruners is not None else found or range(4, text.num_hidden_layers, 3)
    layers = tuple(sorted(layers))
    if labelled is None:
        labelled = compute_saliency(
            model, samples, layers, label, loss_on, tokenizer, label_batch_size, cache_dir, progress
        )
    lacking = [layer for layer in layers if f"layer_{layer}" not in labelled.column_names]
    if lacking:
        raise ValueError(f"layers={list(layers)}: the samples have no labels at {lacking}; label them there first.")
    torch.manual_seed(config.seed)
    if pruners is None:
        # Of given labels nobody says which they are; of several the first is trained on.
        named = {} if isinstance(samples, Dataset) else {"label": label if isinstance(label, str) else label[0]}
        pruners = TokenPruners.for_model(model, layers, **{"notes": named, **pruner_options})
    train, held_out = split_by_id(labelled, config)
    output_dir = Path(output_dir)
    last = sorted(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    run = _run_of(model, pruners, layers, config, labelled)
    if last and resume and _same_run(output_dir, run).get("ended"):
        ended = TokenPruners.from_pretrained(output_dir / _ENDED)
        pruners.load_state_dict(ended.state_dict())
        pruners.history = json.loads((output_dir / "history.json").read_text(encoding="utf-8"))
        return pruners.eval()
    trainer = _PrunerTrainer(
        model=PrunerLoss(pruners, model, layers, config),
        args=_arguments(config, output_dir, held_out is not None, progress),
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=Collator(layers, pruners.earlier_layers),
        callbacks=[EarlyStoppingCallback(config.patience)] if held_out is not None and config.patience else [],
    )
    # Without a progress bar it would print every logged step; they are in `.history`.
    trainer.remove_callback(PrinterCallback)
    if trainer.is_world_process_zero():
        write_json(output_dir / _RUN_FILE, run)
    trainer.train(resume_from_checkpoint=str(last[-1]) if last and resume else None)
    pruners.history = trainer.state.log_history
    pruners.eval()
    if trainer.is_world_process_zero():
        write_json(output_dir / "history.json", pruners.history)
        pruners.save_pretrained(output_dir / "pruners")
        pruners.save_pretrained(output_dir / _ENDED)
        write_json(output_dir / _RUN_FILE, {**run, "ended": True})
    return pruners


def _run_of(
    model: nn.Module, pruners: TokenPruners, layers: Sequence[int], config: TrainingConfig, labelled: Dataset
) -> dict[str, Any]:
    """What a checkpoint belongs to, field by field, in plain JSON types."""
    return {
        **config.to_dict(),
        "layers": list(layers),
        "pruners": {name: list(value.shape) for name, value in pruners.state_dict().items()},
        "begun": pruners.identity,
        "weights": fingerprint(model),
        "samples": _content_of(labelled, layers),
    }


def _content_of(labelled: Dataset, layers: Sequence[int]) -> str:
    """A hash of all samples, whatever their order: tokens, labels, protection."""
    told = ["sample_id", "input_ids", "prompt_length", *(f"layer_{layer}" for layer in layers)]
    told += [name for name in ("protect", "evidence") if name in labelled.column_names]
    rows = (
        content_id(*(row[name] if isinstance(row[name], str) else np.asarray(row[name], float) for name in told))
        for row in labelled
    )
    return content_id(sorted(rows), told)


def _same_run(output_dir: Path, run: dict[str, Any]) -> dict[str, Any]:
    """What ``output_dir`` says of its run; refused if that is another one."""
    file = output_dir / _RUN_FILE
    if not file.is_file():
        return {}
    # A field that the config did not have when the run began had no effect then, as by its default now.
    known = {**TrainingConfig().to_dict(), **json.loads(file.read_text(encoding="utf-8"))}
    if differing := [name for name in run if run[name] != known.get(name)]:
        shown = ", ".join(
            f"{name}={known.get(name)!r} there and {run[name]!r} here" if len(repr(run[name])) < 40 else name
            for name in differing
        )
        raise ValueError(
            f"output_dir={str(output_dir)!r} holds checkpoints of another run ({shown}): give another folder, or "
            "resume=False to begin anew."
        )
    return known


def split_by_id(labelled: Dataset, config: TrainingConfig) -> tuple[Dataset, Dataset | None]:
    """(train, held out); a sample's side depends on its id and the seed only, not on the order or the other samples."""

    def draw(name: str) -> float:
        return int(hashlib.sha256(f"{config.seed}:{name}".encode()).hexdigest()[:8], 16) / 2**32

    draws = np.array([draw(name) for name in labelled["sample_id"]])
    held_out = np.flatnonzero(draws < config.eval_share)
    train = np.flatnonzero(draws >= config.eval_share)
    if len(held_out) == 0 or len(train) == 0:
        return labelled, None
    return labelled.select(train), labelled.select(held_out)


class _PrunerTrainer(Trainer):
    """`Trainer` that logs each loss by name, saves the pruners only, and stops where no loss reaches a stage."""

    _reached = False  # whether the first backward pass has been looked at

    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not self._reached:
            _refuse_unreached(self.accelerator.unwrap_model(model).pruners)
            self._reached = True
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.accelerator.unwrap_model(model).number = self.state.global_step
        outputs = model(**inputs)
        if not outputs["loss"].detach().isfinite():
            parts = ", ".join(f"{name} {value.item():g}" for name, value in outputs.items())
            raise FloatingPointError(
                f"step {self.state.global_step + 1}: the loss is no finite number ({parts}). Lower learning_rate, or "
                "train in float32."
            )
        mode = "train" if model.training else "eval"
        sums = self.__dict__.setdefault("_parts", {})
        for name, value in outputs.items():
            if name != "loss":
                sums.setdefault(mode, {}).setdefault(name, []).append(float(value))
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def log(self, logs, *args, **kwargs):
        mode = "eval" if any(name.startswith("eval_") for name in logs) else "train"
        parts = self.__dict__.get("_parts", {}).pop(mode, {})
        prefix = "eval_" if mode == "eval" else ""
        logs.update({prefix + name: sum(values) / len(values) for name, values in parts.items()})
        super().log(logs, *args, **kwargs)


def _refuse_unreached(pruners: TokenPruners) -> None:
    """After the first backward pass: a stage that no loss reaches would be saved as it began, and nobody would see."""
    lacking = [name for name, weight in pruners.named_parameters() if weight.requires_grad and weight.grad is None]
    if stages := sorted({int(name.split(".")[1]) for name in lacking}):
        raise RuntimeError(
            f"no loss reaches the pruners of the stages at layers {stages} ({', '.join(lacking[:3])}): the scores "
            "there were computed without a graph, or are not used. A fault of the training step, not of your data."
        )


def _arguments(config: TrainingConfig, output_dir: Path, evaluates: bool, progress: bool) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_share,
        weight_decay=config.weight_decay,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        logging_steps=config.logging_steps,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=config.save_steps,
        save_steps=config.save_steps,
        save_total_limit=2,
        load_best_model_at_end=evaluates,
        metric_for_best_model="eval_loss" if evaluates else None,
        greater_is_better=False if evaluates else None,
        bf16=config.mixed_precision == "bf16",
        fp16=config.mixed_precision == "fp16",
        seed=config.seed,
        data_seed=config.seed,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=not progress,
        dataloader_pin_memory=torch.cuda.is_available(),
        dataloader_num_workers=4 if torch.cuda.is_available() else 0,  # a GPU's step is shorter than a batch's reading
    )
    # Several GPUs in one process would be `nn.DataParallel`, whose copies of a module have no parameters: launch one
    # process per GPU instead (`accelerate launch`).
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments
