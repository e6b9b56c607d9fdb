"""A prefilled cache on disk: keys, values and the record of what each layer holds, in one safetensors file.

A long document is pruned once and asked many questions, today and tomorrow:

    with token_pruning(model, "2x"):
        out = model.generate(**document, max_new_tokens=1, return_dict_in_generate=True)
    save_pruned_cache(out.cache, "document.safetensors", model)
    ...
    cache = load_pruned_cache("document.safetensors", model)
    with token_pruning(model, "2x"):
        model.generate(document_and_question, cache=copy.deepcopy(cache))

(Before transformers 5.24 a cache is called ``past_key_values``.) The file holds no token ids; keep those of the prompt.
It names the model that filled it, and another one is refused.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from sdtp_lib.architectures.caches import cache_from, keys_can_be_taken_out, layer_states
from sdtp_lib.architectures.layers import describe
from sdtp_lib.config import PruningNotSupported
from sdtp_lib.files import atomic_write
from sdtp_lib.provenance import adapters_fingerprint, fingerprint
from sdtp_lib.pruning.pruned_cache import CacheRecord, remember, remembered

_FORMAT = "1"
_SIZES = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def save_pruned_cache(cache: Any, path: str | os.PathLike[str], model: nn.Module) -> Path:
    """Write ``cache``, filled by ``model``, pruned or not, to ``path``: over a temporary name, whole or not at all.

    Raises
    ------
    PruningNotSupported
        For a cache that quantises or offloads, or has been given no tokens.
    """
    path = Path(path)
    if not keys_can_be_taken_out(cache) or not getattr(cache, "layers", None):
        raise PruningNotSupported(
            f"past_key_values={type(cache).__name__}: only a dynamic cache with tokens in it can be saved: prefill "
            "with cache_implementation='dynamic', or none."
        )
    states, tensors, kept_as = layer_states(cache), {}, {}
    for layer, state in enumerate(states):
        for name in ("keys", "values"):
            if state[name] is not None:
                tensors[f"{layer}.{name}"] = state[name].detach().cpu().clone(memory_format=torch.contiguous_format)
    record = remembered(cache)
    known = None
    if record is not None:
        for kept in record.kept:  # layers between two cuts share one tensor, and go on sharing it
            if kept is not None and id(kept) not in kept_as:
                kept_as[id(kept)] = f"kept.{len(kept_as)}"
                tensors[kept_as[id(kept)]] = kept.cpu().clone(memory_format=torch.contiguous_format)
        known = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
        known["kept"] = [None if kept is None else kept_as[id(kept)] for kept in record.kept]
    about = {
        "sdtp_cache": _FORMAT, "model": json.dumps(_about(model)), "record": json.dumps(known),
        "layers": json.dumps([{"window": state["window"], "seen": state["seen"]} for state in states]),
    }  # fmt: skip
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata=about)
    return path


def load_pruned_cache(path: str | os.PathLike[str], model: nn.Module) -> Any:
    """The cache that `save_pruned_cache` wrote, each layer on the device of ``model``'s.

    Raises
    ------
    OSError
        If there is no such file.
    ValueError
        For a file that is not whole or no such cache, and for another model, naming what differs.
    """
    path = Path(path)
    path.stat()  # the ordinary error of a missing file
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the file that save_pruned_cache wrote.")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("sdtp_cache") != _FORMAT:
                raise ValueError(f"{path} holds no cache of this version: write it with save_pruned_cache.")
            _refuse_other_model(path, json.loads(about["model"]), _about(model))
            devices = [_device(layer) for layer in describe(model).layers]
            states = json.loads(about["layers"])
            names = set(file.keys())
            for layer, state in enumerate(states):
                for name in ("keys", "values"):
                    whole = f"{layer}.{name}"
                    state[name] = file.get_tensor(whole).to(devices[layer]) if whole in names else None
            record = json.loads(about["record"])
            kept = {name: file.get_tensor(name) for name in names if name.startswith("kept.")}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}): save the cache again.") from None
    cache = cache_from(states)
    if record is not None:
        by_device: dict[tuple[str, torch.device], torch.Tensor] = {}
        record["kept"] = [
            None if name is None else by_device.setdefault((name, devices[layer]), kept[name].to(devices[layer]))
            for layer, name in enumerate(record["kept"])
        ]
        remember(cache, CacheRecord(**{**record, "backend": describe(model).backend}))
    cache.prefilled_inside = True
    return cache


def _about(model: nn.Module) -> dict[str, Any]:
    """What a model must have in common with the one that filled a cache."""
    config = describe(model).config
    sizes = {name: getattr(config, name, None) for name in _SIZES}
    offloaded = any(parameter.is_meta for parameter in model.parameters())
    return {
        **sizes, "dtype": str(model.dtype).removeprefix("torch."), "adapters": adapters_fingerprint(model),
        "weights": None if offloaded else fingerprint(model),
    }  # fmt: skip


def _refuse_other_model(path: Path, saved: dict[str, Any], own: dict[str, Any]) -> None:
    for name, value in own.items():
        # Offloaded weights cannot be looked at: sizes must do.
        if saved.get(name) != value and not (name == "weights" and None in (saved.get(name), value)):
            raise ValueError(
                f"{path} was filled by a model of {name}={saved.get(name)}, and this one has {name}={value}: load that "
                "model as it was, or prefill the prompt anew."
            )


def _device(layer: nn.Module) -> torch.device:
    return next((p.device for p in layer.parameters() if not p.is_meta), torch.device("cpu"))
