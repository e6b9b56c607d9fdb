"""Where a number comes from: the commit, versions, model, device and settings that every result row repeats.

Also what makes two origins the same: rows of one file may differ in time, commit and versions, and in nothing else that
`provenance_of` says. Loads no torch: who has a model has it. Asks git once per run and changes nothing.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Fields in which rows of one file may differ: a run that was stopped may go on under a later version.
MAY_DIFFER = frozenset({"utc", "commit", "host_cpus", "python", "torch", "transformers", "sdtp_lib"})


@functools.cache
def project_root() -> Path:
    """The folder that relative paths of the study are relative to, whatever the working directory is.

    ``SDTP_ROOT`` if set; else the checkout that this package lies in; else (package installed elsewhere) the first
    folder upward from the working directory with a ``pyproject.toml``; else the working directory.
    """
    if named := os.environ.get("SDTP_ROOT"):
        return Path(named).resolve()
    for folder in (Path(__file__).resolve().parent.parent, Path.cwd(), *Path.cwd().parents):
        if (folder / "pyproject.toml").is_file():
            return folder
    return Path.cwd()


def commit() -> str:
    """The commit of the code that runs; ``+changes`` when tracked files differ from it; ``unknown`` outside git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(project_root()), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    def same_code(path: str) -> bool:
        # JupyterLab saves outputs into a notebook by itself; what it computes is the same then. Documents and what
        # `make docs` and `make figures` write are made from rows, and no row from them.
        if path.endswith(".md") or path.startswith(("docs/", "figures/")):
            return True
        file = project_root() / path
        if file.suffix != ".ipynb" or not file.is_file():
            return False
        return _cells(file.read_text(encoding="utf-8")) == _cells(git("show", f"HEAD:./{path}"))

    try:
        changed = git("diff", "--name-only", "--relative", "HEAD").splitlines()
        return git("rev-parse", "--short=12", "HEAD") + ("" if all(map(same_code, changed)) else "+changes")
    except (OSError, subprocess.SubprocessError, ValueError):
        return "unknown"


def _cells(notebook: str) -> list[tuple[str, str, list[str]]]:
    """Kind, text and tags of a notebook's cells: all of it but its outputs."""
    cells = json.loads(notebook)["cells"]
    return [(cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in cells]


_CALLED = {"embedded": "SmolLM2-135M-Instruct", "cpu": "CPU"}


def called(value: str) -> str:
    """What people call a model or a device that rows name; of a folder its own name."""
    return _CALLED.get(value) or (Path(value).name if Path(value).is_dir() else value)


def model_called(fields: Mapping[str, Any]) -> str:
    """The model with a note on its weights, from provenance fields: ``SmolLM2-135M-Instruct (Q4_1, dequantised)``."""
    weights = f" ({fields['weights']})" if fields.get("weights") not in (None, "as published") else ""
    return called(str(fields.get("model"))) + weights


def origin_line(fields: Mapping[str, Any]) -> str:
    """Model, device and commit in one line, from provenance fields: for pictures and first outputs."""
    device = fields.get("device_name") or str(fields.get("device"))
    cores = f", {fields['host_cpus']} cores" if device == "cpu" and fields.get("host_cpus") else ""
    parts = [model_called(fields), _CALLED.get(device, device) + cores, fields.get("dtype")]
    parts += [f"torch {fields['torch']}" if fields.get("torch") else None]
    parts += [f"commit {fields['commit']}" if fields.get("commit") else None]
    return " · ".join(filter(None, parts))


def provenance_of(
    model: Any = None,
    *,
    model_name: str | None = None,
    config: Any = None,
    seed: int | None = None,
    weights: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Where a number comes from, as flat fields that every row of a run repeats.

    Parameters
    ----------
    model
        A transformers model; device, dtype, name, attention implementation and fingerprints of the weights and of the
        adapters at work are read off it. None for pure counts.
    model_name
        What the run called the model (``"embedded"``, a folder, a Hub id); by default the model's own name.
    config
        A `PruningConfig`, whose fields become ``pruning_<field>``.
    seed
        The run's seed.
    weights
        A note on the weights, such as ``"Q4_1, dequantised"``; by default the model's own.
    settings
        Whatever else decides every number of the run and stands in no row's key, such as ``threads``.
    """
    own_config = getattr(model, "config", None)
    fields: dict[str, Any] = {
        "utc": _utc_now(),
        "commit": commit(),
        "host_cpus": os.cpu_count(),
        "python": platform.python_version(),
        **{name: _version_of(name) for name in ("torch", "transformers")},
        "sdtp_lib": _version_of("sdtp-lib"),
        "model": model_name or getattr(own_config, "_name_or_path", None) or None,
        "model_type": getattr(own_config, "model_type", None),
        "weights": weights,
        "weights_fingerprint": None,
        "adapters": None,
        "device": str(model.device) if model is not None else None,
        "device_name": _device_name(model),
        "dtype": str(model.dtype).removeprefix("torch.") if model is not None else None,
        "attn_implementation": getattr(own_config, "_attn_implementation", None),
        "seed": seed,
        **settings,
    }
    if hasattr(model, "named_parameters"):
        fields |= {"weights": weights or weights_note(model), "weights_fingerprint": fingerprint(model)}
        fields["adapters"] = adapters_fingerprint(model)
    if config is not None:
        fields |= {f"pruning_{field}": value for field, value in config.to_dict().items()}
    return fields


def identity(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the provenance fields that all rows of one file share.

    A device counts without its number, since processes that share a run sit on ``cuda:0``, ``cuda:1`` and so on. The
    pruning is left out: a file may hold several, told apart by the rows' keys.
    """
    same = {name: v for name, v in fields.items() if name not in MAY_DIFFER and not name.startswith("pruning_")}
    if same.get("device"):
        same["device"] = str(same["device"]).partition(":")[0]
    return same


def weights_note(model: Any) -> str:
    """What a result row says of the weights: ``"Q4_1, dequantised"`` (the embedded model) or ``"as published"``."""
    return getattr(model.config, "weights_note", None) or "as published"


def fingerprint(model: Any) -> str:
    """A short hash of all numbers of a model, adapters and rotary frequencies included: a change of one, or two that
    change places, give another.

    The same in float32 and bfloat16: values are rounded to bfloat16 first. Offloaded weights (``meta``) are left out.
    Rotary frequencies and their scale stand in no weight file, but a context stretched by YaRN computes with others.
    """
    named = [(name, tensor) for name, tensor in sorted(stored_tensors(model)) if tensor.device.type != "meta"]
    digest = hashlib.sha256()
    for (name, tensor), total in zip(named, _sums([tensor for _, tensor in named]), strict=True):
        digest.update(f"{name} {tuple(tensor.shape)} {total}".encode())
    frequencies, scales = rotary(model)
    for total in _sums(frequencies):
        digest.update(str(total).encode())
    digest.update(str(scales).encode())
    return digest.hexdigest()[:16]


def stored_tensors(model: Any) -> list[tuple[str, Any]]:
    """Parameters and those buffers that go into a weight file (a router's bias, quantised weights), by name."""
    found = list(model.named_parameters())
    for module_name, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found.append((f"{module_name}.{name}", buffer))
    return found


def rotary(model: Any) -> tuple[list[Any], list[float]]:
    """Frequencies of the rotary position embeddings (as they were before a long prompt), and what cos and sin are
    multiplied by."""
    frequencies, scales = [], []
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and "original" not in name and buffer.device.type != "meta":
                kind = name.removesuffix("inv_freq")
                frequencies.append(getattr(module, f"{kind}original_inv_freq", buffer))
                scales.append(float(getattr(module, f"{kind}attention_scaling", 1.0)))
    return frequencies, scales


_AT_ONCE = 1 << 24  # numbers: 32 MB in bfloat16


def _sums(tensors: list[Any]) -> list[list[int]]:
    """Of each tensor the sums of its pieces, exact and the same on every device; one wait per device.

    Four bfloat16 are read as one integer of 64 bits, mixed, and multiplied by an odd number of its place, so that
    numbers which change places change the sum. Integers wrap round: no order of addition changes the result.
    Example: 6 numbers become 2 integers, the second filled up with zeros, times 1 and 3.
    """
    torch = sys.modules.get("torch")  # loaded where there is a tensor, and not by this module
    sums = []
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        if not tensor.is_floating_point() or tensor.element_size() == 1:
            flat = flat.view(torch.uint8)  # quantised: bytes as they are
        pieces = []
        for piece in flat.split(_AT_ONCE) if len(flat) else ():
            raw = piece if piece.dtype == torch.uint8 else piece.to(torch.bfloat16).view(torch.uint8)
            words = torch.nn.functional.pad(raw, (0, -len(raw) % 8)).view(torch.int64)
            # The shift first: else two flipped signs, 2 x 2^63, would be nothing.
            pieces.append(((words ^ (words >> 31)) * torch.arange(1, 2 * len(words), 2, device=words.device)).sum())
        sums.append(torch.stack(pieces) if pieces else None)
    places: dict[Any, list[int]] = {}
    for place, total in enumerate(sums):
        if total is not None:
            places.setdefault(total.device, []).append(place)
    found: list[list[int]] = [[] for _ in sums]
    for some in places.values():
        values = torch.cat([sums[place] for place in some]).tolist()
        for place in some:
            found[place], values = values[: len(sums[place])], values[len(sums[place]) :]
    return found


def adapters_fingerprint(model: Any) -> str | None:
    """A short hash of the PEFT adapters at work in ``model``, names and weights; None where none is."""
    digest, found = hashlib.sha256(), False
    for module_name, module in model.named_modules():
        # What PEFT's tuner layers (LoRA and its kin) have in common; their adapters may be switched off or merged.
        holders = getattr(module, "adapter_layer_names", None)
        if holders is None or (getattr(module, "disable_adapters", False) and not getattr(module, "merged", False)):
            continue
        for adapter in getattr(module, "active_adapters", ()):
            for holder in holders:
                parts = getattr(module, holder, {})
                if adapter not in parts:
                    continue
                found = True
                part = parts[adapter]
                tensors = list(part.parameters()) if hasattr(part, "parameters") else [part]
                scale = getattr(module, "scaling", {})
                scale = scale.get(adapter) if isinstance(scale, dict) else scale
                digest.update(f"{module_name} {holder} {adapter} {scale}".encode())
                digest.update(str(_sums(tensors)).encode())
    return digest.hexdigest()[:16] if found else None


def scorer_id(scorer: Any) -> str | None:
    """What tells a scorer from every other that goes by the same name: its kind, settings and numbers; None for none.

    A scorer says it itself by an attribute ``identity``. Else: the fields of a dataclass, a hash of a module's weights,
    or the name of a function.
    """
    if scorer is None:
        return None
    text = _described(scorer)
    return text if len(text) <= 100 else f"{text[:60]}... {content_id(text)}"


def content_id(*parts: Any) -> str:
    """A short hash of numbers, texts, lists, dataclasses and tensors: equal content, equal hash, on every machine."""
    return hashlib.sha256("\x1f".join(map(_described, parts)).encode()).hexdigest()[:16]


def _described(value: Any) -> str:
    if (own := getattr(value, "identity", None)) is not None:
        return str(own)
    if hasattr(value, "state_dict"):
        return f"{type(value).__name__} {content_id(dict(value.state_dict()))}"
    if hasattr(value, "detach"):
        value = value.detach().float().cpu().numpy()
    if hasattr(value, "tobytes"):
        return f"{value.dtype}{list(value.shape)} {hashlib.sha256(value.tobytes()).hexdigest()[:16]}"
    if dataclasses.is_dataclass(value):
        fields = (f"{field.name}={_described(getattr(value, field.name))}" for field in dataclasses.fields(value))
        return f"{type(value).__name__.lstrip('_')}({', '.join(fields)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_described(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_described, value)) + "]"
    if isinstance(value, functools.partial):
        return f"{_described(value.func)}{_described(value.args)}{_described(value.keywords)}"
    # Never a default repr: it holds an address, which is another one in the next process.
    plain = isinstance(value, (str, int, float, bool, type(None)))
    return repr(value) if plain else getattr(value, "__qualname__", type(value).__qualname__)


def _device_name(model: Any) -> str | None:
    """The kind of GPU: times of two kinds do not belong into one file, though both are ``cuda``."""
    if getattr(getattr(model, "device", None), "type", None) != "cuda":
        return None
    torch = sys.modules["torch"]  # there, since the model is; this module imports none
    return torch.cuda.get_device_name(model.device)


def _utc_now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@functools.cache
def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
