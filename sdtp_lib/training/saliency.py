"""The label pass over many samples: resumable, keyed by sample id, cached as a `datasets` data set.

One file per sample (written whole or not at all), so a killed run goes on where it stopped and several processes may
share the work; labels can never end up at another sample. What a label is, `labels` knows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from sdtp_lib.architectures.attention_readings import attention_of_earlier_layers, refuse_unreadable, sources_of
from sdtp_lib.architectures.layers import Architecture, describe, layer_inputs, pad_left
from sdtp_lib.checked import one_of
from sdtp_lib.extras import extra
from sdtp_lib.models import cache_directory
from sdtp_lib.provenance import adapters_fingerprint, fingerprint
from sdtp_lib.pruning.stage import QUERY_TOKENS, earlier_layers
from sdtp_lib.records import atomic_write
from sdtp_lib.training.labels import DEFAULT_LABEL, LOSS_ON, checked_labels, label_column, saliency_of

if TYPE_CHECKING:
    from datasets import Dataset

CONTINUATION_TOKENS = 64


def compute_saliency(
    model: nn.Module,
    samples: Sequence[dict[str, Any]],
    layers: Sequence[int],
    label: str | Sequence[str] = DEFAULT_LABEL,
    loss_on: str = "response",
    tokenizer: Any | None = None,
    batch_size: int = 1,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    store_hidden: bool = False,
) -> Dataset:
    """Label the prompt tokens of ``samples`` at each of ``layers``.

    Parameters
    ----------
    samples
        Dicts with ``id`` and either ``prompt_ids`` and ``response_ids`` or ``prompt`` and ``response`` (texts, which
        need ``tokenizer``); see `sdtp_lib.data`. A sample with ``prompt_ids`` and ``own_tokens`` has no response: the
        model answers greedily with at most so many tokens, up to where it begins to repeat itself. ``loss_mask`` (one
        boolean per response token): which of them the loss is over, all without it. ``protect`` (one boolean per prompt
        token, `pruning.protection`) goes along to training, where no stage drops these tokens.
    label
        One of `LABELS`, or several, computed together.
    loss_on
        ``"response"``; ``"all"`` tokens (what an earlier reproduction did, and worse); ``"continuation"``: the model's
        own greedy answer in place of the response.
    cache_dir
        Where the labels are kept, default the user's cache. What is there already is not computed again: several
        processes may label a part each (`processes.Share.of`), and whoever asks for all then reads them.
    store_hidden
        Also keep the other inputs of pruners at ``layers``, in bfloat16, so that they train without the model: hidden
        states of the prompt, and the attention paid to its tokens before (`pruning.stage.earlier_layers`).

    Returns
    -------
    datasets.Dataset
        A row for each labelled sample: ``sample_id, category, input_ids, prompt_length``, ``layer_<l>`` (one number a
        prompt token, of the first label), ``layer_<l>_<label>`` for further labels, ``file`` (where hidden states are),
        ``protect`` if a sample has it.

    Raises
    ------
    ValueError
        For an unknown label or loss, a sample without prompt or response, one whose ``protect`` does not fit its
        prompt, or two samples of one id.
    PruningNotSupported
        For families that cannot have the label (`saliency_of`).
    FloatingPointError
        If a label is not a finite number; labels made before it are kept.
    """
    with extra("train"):  # before any compute
        from datasets import Dataset
    one_of("loss_on", loss_on, LOSS_ON)
    layers = tuple(layers)
    tokenised = [_tokenised(sample, tokenizer) for sample in samples]
    ids = [sample["id"] for sample in tokenised]
    if len(set(ids)) != len(ids):
        raise ValueError("samples: two of them share an id, and labels are keyed by id; make the ids unique.")
    protect = _protection(samples, tokenised)
    architecture = describe(model)
    labels = checked_labels(architecture, layers, label)
    if store_hidden:
        refuse_unreadable(architecture, layers)
    about = {"model": fingerprint(model), "dtype": str(model.dtype), "layers": layers, "labels": labels,
             "loss_on": loss_on, "schema": 2}  # fmt: skip
    if architecture.windowed_layers():
        about["attention"] = sources_of(architecture, earlier_layers(layers))
    if (adapters := adapters_fingerprint(model)) is not None:
        about["adapters"] = adapters
    folder = Path(cache_dir or cache_directory()) / "saliency" / _digest(about)
    folder.mkdir(parents=True, exist_ok=True)
    files = {sample["id"]: folder / f"{_digest(sample)}.safetensors" for sample in tokenised}
    missing = [s for s in tokenised if not _complete(files[s["id"]], layers if store_hidden else ())]
    bar = tqdm(total=len(missing), desc=f"saliency ({', '.join(labels)})", disable=not progress, unit="sample")
    with bar:
        for batch in _batches(missing, batch_size):
            for sample, tensors in _label_batch(architecture, batch, layers, labels, loss_on, store_hidden):
                meta = {"sample_id": sample["id"], "category": str(sample.get("category", ""))}
                meta["looked_back"] = json.dumps(earlier_layers(layers))
                with atomic_write(files[sample["id"]]) as temporary:
                    save_file(tensors, str(temporary), metadata=meta)
                bar.update()
    rows = [_row(files[name], layers, labels) for name in ids]
    if protect:
        rows = [{**row, "protect": protect[row["sample_id"]]} for row in rows]
    return Dataset.from_list(rows)


def stored_inputs(
    file: str | Path, layers: Sequence[int], back: Mapping[int, Sequence[int]] | None = None
) -> dict[str, Tensor]:
    """What ``store_hidden`` kept of a sample's prompt, by name; nothing if it was not kept for these very layers.

    ``hidden`` (S, P, D) enters each of ``layers``. With ``back``, the earlier layers that each stage reads, also
    ``attention`` (S, P, A), what `Stage.attention_mass` shows there. bfloat16; the file is opened once.
    """
    if not Path(file).exists():
        return {}
    names = ("hidden", "attention") if back else ("hidden",)
    with safe_open(str(file), "pt") as stored:
        kept = json.loads(stored.metadata().get("looked_back", "{}"))
        if any(kept.get(str(layer)) != list(earlier) for layer, earlier in (back or {}).items()):
            return {}
        if not {f"{name}_{layer}" for name in names for layer in layers} <= set(stored.keys()):
            return {}
        return {name: torch.stack([stored.get_tensor(f"{name}_{layer}") for layer in layers]) for name in names}


def _label_batch(
    architecture: Architecture,
    batch: Sequence[dict[str, Any]],
    layers: tuple[int, ...],
    labels: tuple[str, ...],
    loss_on: str,
    store_hidden: bool,
) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    model = architecture.model
    device = model.get_input_embeddings().weight.device
    if loss_on == "continuation":
        batch = [{**sample, "own_tokens": CONTINUATION_TOKENS} for sample in batch]
    batch = [
        {**sample, "response_ids": own_response(model, sample["prompt_ids"], sample["own_tokens"])}
        if "own_tokens" in sample
        else sample
        for sample in batch
    ]
    rows = [sample["prompt_ids"] + sample["response_ids"] for sample in batch]
    ids, mask = (tensor.to(device) for tensor in pad_left(rows))
    response = torch.zeros_like(mask)
    for index, sample in enumerate(batch):
        response[index, ids.shape[1] - len(sample["response_ids"]) :] = 1
    target = mask if loss_on == "all" else response.clone()
    for index, sample in enumerate(batch):
        if loss_on == "response" and "loss_mask" in sample:
            target[index, ids.shape[1] - len(sample["response_ids"]) :] = torch.tensor(sample["loss_mask"]).to(target)
    prompt_mask = (mask - response).bool()
    back = earlier_layers(layers) if store_hidden else {}
    with (
        layer_inputs(architecture, layers if store_hidden else ()) as seen,
        attention_of_earlier_layers(architecture, back, QUERY_TOKENS, lambda _layer: prompt_mask) as paid,
    ):
        saliency = saliency_of(architecture, ids, mask, target, layers, labels)
    _refuse_not_finite(architecture, batch, saliency)
    for index, sample in enumerate(batch):
        start = ids.shape[1] - len(rows[index])
        prompt = slice(start, start + len(sample["prompt_ids"]))
        tensors = {
            "input_ids": torch.tensor(rows[index]),
            "prompt_length": torch.tensor([len(sample["prompt_ids"])]),
            **{
                f"{name}_{layer}": saliency[name][layer][index, prompt].cpu().contiguous()
                for name in labels
                for layer in layers
            },
        }
        for layer in layers if store_hidden else ():
            for name, kept in (("hidden", seen[layer]), ("attention", paid[layer])):
                tensors[f"{name}_{layer}"] = kept[index, prompt].detach().to("cpu", torch.bfloat16).contiguous()
        yield sample, tensors


def _refuse_not_finite(
    architecture: Architecture, batch: Sequence[dict[str, Any]], saliency: Mapping[str, Mapping[int, Tensor]]
) -> None:
    for name, by_layer in saliency.items():
        for layer, found in by_layer.items():
            for sample, label in zip(batch, found, strict=True):
                if not label.isfinite().all():
                    raise FloatingPointError(
                        f"sample {sample['id']!r}: its {name} label at layer {layer} is not finite. In "
                        f"{str(architecture.model.dtype).removeprefix('torch.')} this model's numbers or gradients "
                        "overflow on it, or its weights hold no numbers: use float32 or bfloat16, or leave it out."
                    )


@torch.no_grad()
def own_response(model: nn.Module, prompt_ids: Sequence[int], tokens: int) -> list[int]:
    """The model's own greedy answer, at most ``tokens``; it ends where it begins to repeat itself."""
    device = model.get_input_embeddings().weight.device
    prompt = torch.tensor([list(prompt_ids)], device=device)
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False)
    answer = output[0, len(prompt_ids) :].tolist()
    return answer[: _unrepeated(answer)]


def _unrepeated(ids: Sequence[int], width: int = 12, least: int = 16) -> int:
    """How many tokens come before the second time that ``width`` in a row do: a loop copies itself, not the prompt."""
    seen = set()
    for start in range(len(ids) - width + 1):
        run = tuple(ids[start : start + width])
        if run in seen:
            return max(start, min(least, len(ids)))
        seen.add(run)
    return len(ids)


def _tokenised(sample: dict[str, Any], tokenizer: Any | None) -> dict[str, Any]:
    answered = "response_ids" in sample or "own_tokens" in sample
    if "prompt_ids" not in sample or not answered:
        if tokenizer is None or "prompt" not in sample or "response" not in sample:
            raise ValueError(
                f"sample {sample.get('id')!r} needs prompt_ids and response_ids, or prompt, response and a tokenizer."
            )
        special = not getattr(tokenizer, "chat_template", None)
        sample = {
            **sample,
            "prompt_ids": tokenizer(sample["prompt"], add_special_tokens=special)["input_ids"],
            "response_ids": tokenizer(sample["response"], add_special_tokens=False)["input_ids"],
        }
    if not sample["prompt_ids"] or not (sample.get("response_ids") or sample.get("own_tokens")):
        raise ValueError(f"sample {sample.get('id')!r} has an empty prompt or response.")
    if len(sample.get("loss_mask", sample.get("response_ids", ()))) != len(sample.get("response_ids", ())):
        raise ValueError(
            f"loss_mask of sample {sample['id']!r} has {len(sample['loss_mask'])} entries: give one per response token."
        )
    keep = ("id", "category", "prompt_ids", "response_ids", "own_tokens", "loss_mask")
    return {name: sample[name] for name in keep if name in sample}


def _protection(samples: Sequence[Mapping[str, Any]], tokenised: Sequence[Mapping[str, Any]]) -> dict[str, list[bool]]:
    """Sample id -> ``protect`` for each sample, all False where it has none; empty if none has any."""
    if not any(sample.get("protect") is not None for sample in samples):
        return {}
    found = {}
    for sample, known in zip(samples, tokenised, strict=True):
        given, length = sample.get("protect"), len(known["prompt_ids"])
        given = [False] * length if given is None else torch.as_tensor(given).flatten().tolist()
        if len(given) != length or not all(isinstance(each, bool) for each in given):
            raise ValueError(
                f"protect of sample {known['id']!r} has {len(given)} entries for a prompt of {length} tokens: give one "
                "boolean per prompt token."
            )
        found[known["id"]] = given
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


def _complete(file: Path, hidden_at: Sequence[int]) -> bool:
    if not file.exists() or not hidden_at:
        return file.exists()
    with safe_open(str(file), "pt") as stored:
        return {f"hidden_{layer}" for layer in hidden_at} <= set(stored.keys())


def _row(file: Path, layers: tuple[int, ...], labels: tuple[str, ...]) -> dict[str, Any]:
    with safe_open(str(file), "pt") as stored:
        meta = stored.metadata()
        row = {
            "sample_id": meta["sample_id"],
            "category": meta["category"],
            "input_ids": stored.get_tensor("input_ids").tolist(),
            "prompt_length": int(stored.get_tensor("prompt_length")[0]),
        }
        for name in labels:
            for layer in layers:
                row[label_column(layer, name, labels)] = stored.get_tensor(f"{name}_{layer}").tolist()
    return {**row, "file": str(file)}


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
