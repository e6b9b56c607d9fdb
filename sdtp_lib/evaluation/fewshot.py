"""The paper's eight few-shot tasks as lm-eval defines them, on local files; one row per item and variant.

lm-eval's own task files give prompts, choices and metrics. The data come from a folder of ``<task>.train.jsonl`` and
``<task>.validation.jsonl`` instead of the Hub, so a run needs no network and can stop and go on at any item.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdtp_lib.data.texts import json_lines
from sdtp_lib.extras import extra
from sdtp_lib.harness import SDTPLM
from sdtp_lib.records import RowWriter, content_id

with extra("eval"):
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

TASKS = ("copa", "piqa", "winogrande", "mathqa", "boolq", "cb", "wic", "wsc")
_FILES = {
    "copa": "super_glue/copa/default", "boolq": "super_glue/boolq/default", "cb": "super_glue/cb/default",
    "wic": "super_glue/wic/default", "wsc": "super_glue/wsc/default", "piqa": "piqa/piqa",
    "winogrande": "winogrande/default", "mathqa": "mathqa/mathqa",
}  # fmt: skip
_CB_LABELS = ("entailment", "contradiction", "neutral")


def local_task(name: str, folder: Path, *, shots: int = 5, seed: int = 1234) -> ConfigurableTask:
    """lm-eval's task on local data, with ``shots`` examples drawn from the training file.

    Raises
    ------
    ValueError
        For a task that is not one of the eight.
    OSError
        If its files are not in ``folder``.
    """
    if name not in TASKS:
        raise ValueError(f"task={name!r} is unknown: choose among {', '.join(TASKS)}.")
    paths = {split: Path(folder) / f"{name}.{split}.jsonl" for split in ("train", "validation")}
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise OSError(f"{folder} has no {' and '.join(missing)}: give a folder with both files of each task.")
    root = Path(importlib.util.find_spec("lm_eval").submodule_search_locations[0]) / "tasks"
    config = dict(load_yaml(root / f"{_FILES[name]}.yaml", resolve_func=True))
    config["test_split"] = None  # the validation file is what is measured
    config["custom_dataset"] = lambda **_: _dataset(name, paths)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # metrics of `evaluate` that it cannot look up offline
        task = ConfigurableTask(config=config)
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=seed)
    return task


def run_task(
    task: ConfigurableTask,
    models: Mapping[str, SDTPLM],
    writer: RowWriter,
    *,
    limit: int = 200,
    progress: Callable[[str], None] | None = None,
) -> None:
    """One row for each of the first ``limit`` items and each model that ``writer`` does not have yet.

    A row has ``dataset, item, variant, shots, score`` (accuracy, 0 or 1), ``margin_nats`` (log-likelihood of the right
    choice minus that of the best wrong one), ``loglikelihoods``, ``prompt_tokens`` and, where pruned,
    ``compression_ratio``.
    ``OtherProvenance`` where ``writer`` has rows of these names that another scorer, prompt (its shots, say) or pruning
    config made.
    """
    ids = writer.scored_by({name: model.scorer for name, model in models.items()})
    configs = {name: content_id(model.pruning and model.pruning.to_dict()) for name, model in models.items()}
    task.build_all_requests(limit=limit)
    items: dict[int, list[Any]] = {}
    for instance in task.instances:
        items.setdefault(instance.doc_id, []).append(instance)
    for number, instances in sorted(items.items()):
        asked = content_id([instance.args for instance in sorted(instances, key=lambda instance: instance.idx)])
        for variant, model in models.items():
            key = f"{task.config.task}|{number}|{variant}"
            made_from = {"sample_hash": asked, "config_hash": configs[variant]}
            if writer.done(key, **made_from):
                continue
            labels = {"dataset": task.config.task, "item": str(number), "variant": variant}
            labels["shots"] = task.config.num_fewshot
            labels |= {"scorer_id": ids[variant], **made_from}
            try:
                fields = _scored(task, instances, model)
            except (RuntimeError, ValueError, MemoryError) as error:
                writer.add(key, kind="failure", **labels, error=f"{type(error).__name__}: {str(error)[:300]}")
            else:
                writer.add(key, kind="item", **labels, **fields)
        if progress is not None:
            progress(f"{task.config.task} {number}")


def _scored(task: ConfigurableTask, instances: Sequence[Any], model: SDTPLM) -> dict[str, Any]:
    instances = sorted(instances, key=lambda instance: instance.idx)
    answers = model.loglikelihood(instances, disable_tqdm=True)
    doc = instances[0].doc
    values = [value for value, _ in answers][: len(task.doc_to_choice(doc))]
    gold = _gold(task, doc)
    others = [value for index, value in enumerate(values) if index != gold]
    fields = {
        "score": float(task.process_results(doc, answers)["acc"]),
        "margin_nats": values[gold] - max(others),
        "loglikelihoods": values,
        "prompt_tokens": len(model.tok_encode(instances[0].args[0])),
    }
    if model.pruning is not None:
        fields["compression_ratio"] = model.last_trace.compression_ratio
    return fields


def _gold(task: ConfigurableTask, doc: Mapping[str, Any]) -> int:
    target = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    choices = task.doc_to_choice(doc)
    return choices.index(target) if isinstance(target, str) and target in choices else int(target)


def _dataset(name: str, paths: Mapping[str, Path]) -> Any:
    import datasets

    read = {
        split: [_official(name, row) for row in json_lines(path.read_bytes(), path.name)]
        for split, path in paths.items()
    }
    return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in read.items()})


def _official(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """The Hub's form of a row: labels as numbers, wsc's spans as fields of their own, MathQA's options lower case."""
    if name == "cb" and isinstance(row["label"], str):
        row["label"] = _CB_LABELS.index(row["label"])
    if isinstance(row.get("label"), bool):
        row["label"] = int(row["label"])
    if name == "wsc" and isinstance(row.get("target"), dict):
        row = row | row.pop("target")
    if name == "mathqa":
        row["options"] = row["options"].lower()
    return row
