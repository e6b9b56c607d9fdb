"""Does the pruned model compute what the masked one computes? Checked on the model itself, once, before it is used.

`verify_pruning` runs one short prompt twice: pruned (a random kept set; prefill, then two decode steps on the pruned
cache) and at full length with the dropped tokens hidden (`masked_reference`, which shares no code with the engine).
`check_on_entry` is what the engine calls: families that this release has swept are trusted (``supported.json``), all
others are checked, each model object once. A short prompt does not reach past a long sliding window.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.resources
import inspect
import json
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sdtp_lib.checked import one_of
from sdtp_lib.config import PruningConfig, PruningNotSupported
from sdtp_lib.pruning.masked_reference import NoReference, find_layers, masked_forward

# `engine.token_pruning`, handed in by the engine, which asks this module on entry.
Prune = Callable[..., contextlib.AbstractContextManager]
MODES = ("auto", "always", "never")
PROMPT_TOKENS, STEPS, SEED = 28, 2, 20250404
_found: weakref.WeakKeyDictionary[nn.Module, dict[Any, Verification | str]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Verification:
    """How far the pruned model was from the masked one, in units of a logit.

    Attributes
    ----------
    prefill_difference, decode_difference
        Largest difference of a logit: over the kept prompt tokens, over the decode steps.
    tolerance
        What rounding in this model's dtype explains.
    seconds
        What the check took.
    """

    prefill_difference: float
    decode_difference: float
    tolerance: float
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether both differences are explained by rounding."""
        return max(self.prefill_difference, self.decode_difference) <= self.tolerance

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.prefill_difference:.2g} in prefill and {self.decode_difference:.2g} in "
            f"decode, where rounding explains {self.tolerance:.2g} ({self.seconds:.2f} s)"
        )


def check_on_entry(
    model: nn.Module, prune: Prune, model_type: str, backend: str, mode: str = "auto"
) -> Verification | None:
    """Let ``model`` be pruned, or refuse; called by the engine on entry of a ``with``.

    Parameters
    ----------
    mode
        ``"auto"``: check the model unless this release's list has its family, backend and transformers version.
        ``"always"``: check in any case. ``"never"``: do not check.

    Returns
    -------
    Verification or None
        What was measured now or earlier on this model object; None where nothing was checked.

    Raises
    ------
    ValueError
        For an unknown mode.
    PruningNotSupported
        Where the pruned model is not the masked one.
    """
    one_of("verify", mode, MODES)
    if mode == "never" or (mode == "auto" and trusted(model, model_type, backend)):
        return None
    return verify_pruning(model, prune, backend=backend)


def trusted(model: nn.Module, model_type: str, backend: str) -> bool:
    """Whether this release's sweep saw this family and backend work, with this transformers version.

    Only transformers' own classes: remote code and subclasses may carry a family's name and compute something else.
    """
    import transformers

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not type(inner).__module__.startswith("transformers.models."):
        return False
    minor = ".".join(transformers.__version__.split(".")[:2])
    return backend in supported().get(minor, {}).get(f"{model_type} {type(inner).__name__}", ())


@functools.cache
def supported() -> Mapping[str, Mapping[str, list[str]]]:
    """transformers version (two numbers) -> family and class -> backends; written by ``make sweep``."""
    file = importlib.resources.files("sdtp_lib.pruning").joinpath("supported.json")
    return json.loads(file.read_text(encoding="utf-8"))["works"]


def verify_pruning(model: nn.Module, prune: Prune, *, backend: str | None = None, again: bool = False) -> Verification:
    """Compare the pruned model with the masked one on one short prompt; what was found is kept with the model object.

    Parameters
    ----------
    prune
        `engine.token_pruning`.
    backend
        The attention backend in force, default what the configuration says.
    again
        Check even if this object was checked before with this backend and dtype.

    Raises
    ------
    PruningNotSupported
        Where they differ by more than rounding explains (with the figures), or where the model cannot be checked.
    """
    backend = backend or str(getattr(model.config, "_attn_implementation", None) or "eager")
    known = _found.setdefault(model, {})
    key = (backend, _dtype(model))
    if again or key not in known:
        try:
            found = _measured(model, prune)
            known[key] = found if found.holds else f"{found}, so kept tokens would be computed wrongly"
        except PruningNotSupported:
            raise
        except NoReference as unknown:
            known[key] = f"there is no reference to compare it with, since {unknown}"
        except Exception as error:
            known[key] = f"it ended in {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if isinstance(found := known[key], str):
        raise PruningNotSupported(
            f"{type(model).__name__} with attn_implementation={backend!r} did not pass the check that pruning is exact "
            f"on it: {found}. Try attn_implementation='sdpa' or 'eager', or report the family; verify='never' goes on "
            "regardless."
        )
    return found


@torch.no_grad()
def _measured(model: nn.Module, prune: Prune) -> Verification:
    start = time.perf_counter()
    depth = len(find_layers(model))
    if depth < 2:
        raise NoReference("it has one layer, and the first is never pruned")
    config = PruningConfig(
        layers=sorted({1, depth // 2}), keep_ratio=0.6, sink_tokens=2, min_local_tokens=2, local_ratio=0.0
    )
    with _untouched(model):
        tokens = _prompt(model)
        kept, prefill, decoded = _pruned(model, prune, config, tokens)
        expected = masked_forward(model, tokens, kept, PROMPT_TOKENS, **_positions(model, tokens)).logits.double()
        # What rounding at the first layer's input has become when it reaches the logits: measured, since depth, experts
        # and outliers decide it more than the dtype does.
        nudged = _nudged(model, tokens, kept).double()
    off_prefill = float((prefill.double() - expected[:, kept[max(kept)].to(expected.device)]).abs().max())
    off_decode = float((decoded.double() - expected[:, PROMPT_TOKENS:]).abs().max())
    rounding = float((nudged - expected).abs().max())
    scale, unit = float(expected.abs().max()), _unit(model)
    # A wrong mask moves logits by a tenth of their size or more. Float32 is far from that and gets room to spare; in
    # 16 bits rounding comes near it, and a sixth of what is let pass here is the most that was seen (LOG.md).
    slack = 3 if unit > 1e-6 else 32
    tolerance = slack * (rounding + unit * max(scale, 1.0))
    seconds = time.perf_counter() - start
    return Verification(off_prefill, off_decode, tolerance, seconds)


def _pruned(
    model: nn.Module, prune: Prune, config: PruningConfig, tokens: torch.Tensor
) -> tuple[dict[int, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Stage -> kept positions, logits of the kept tokens, logits of the decode steps; by the public face only."""
    generator = torch.Generator().manual_seed(SEED)

    def scorer(stage: Any) -> torch.Tensor:
        return torch.rand(stage.positions.shape, generator=generator)

    with prune(model, config, scorer, verify="never") as trace:
        output = model(**_inputs(model, tokens[:, :PROMPT_TOKENS]), use_cache=True, return_dict=True)
        prefill, steps = output.logits, []
        for end in range(PROMPT_TOKENS + 1, PROMPT_TOKENS + STEPS + 1):
            inputs = _inputs(model, tokens[:, :end], new=1)
            output = model(**inputs, **_cache(model, output), use_cache=True, return_dict=True)
            steps.append(output.logits)
    kept = {stage: positions[0].cpu() for stage, positions in trace.kept_positions.items()}
    if set(kept) != set(config.layers) or len(kept[max(kept)]) >= PROMPT_TOKENS:
        raise NoReference("nothing of a short prompt was pruned")
    return kept, prefill, torch.cat(steps, dim=1)


def _inputs(model: nn.Module, tokens: torch.Tensor, new: int | None = None) -> dict[str, torch.Tensor]:
    """What ``generate`` hands to a model for the last ``new`` of ``tokens``."""
    new = new or tokens.shape[1]
    inputs = {"input_ids": tokens[:, -new:], "attention_mask": torch.ones_like(tokens)}
    return inputs | {name: positions[:, -new:] for name, positions in _positions(model, tokens).items()}


def _positions(model: nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return {}
    return {"position_ids": torch.arange(tokens.shape[1], device=tokens.device)[None]}


def _cache(model: nn.Module, output: Any) -> dict[str, Any]:
    from transformers import Cache

    takes = inspect.signature(type(model).forward).parameters
    for name, value in output.items():
        if isinstance(value, Cache):
            return {next((n for n in (name, "cache", "past_key_values") if n in takes), name): value}
    raise NoReference("it returns no cache to decode from")


def _prompt(model: nn.Module) -> torch.Tensor:
    embedding = model.get_input_embeddings()
    device = next((p.device for p in embedding.parameters() if p.device.type != "meta"), torch.device("cpu"))
    text = model.config.get_text_config(decoder=True)
    special = {getattr(text, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")} - {None}
    special = {token for s in special for token in (s if isinstance(s, list) else [s])}
    generator = torch.Generator().manual_seed(SEED)
    vocabulary = int(text.vocab_size)
    ids = torch.randint(0, vocabulary, (4 * (PROMPT_TOKENS + STEPS),), generator=generator).tolist()
    ids = [token for token in ids if token not in special] or ids
    return torch.tensor([ids[: PROMPT_TOKENS + STEPS]], device=device)


def _nudged(model: nn.Module, tokens: torch.Tensor, kept: Mapping[int, torch.Tensor]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED + 1)

    def nudge(_module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        hidden = args[0] if args else kwargs["hidden_states"]
        signs = torch.randint(0, 2, hidden.shape, generator=generator).mul(2).sub(1).to(hidden.device, hidden.dtype)
        hidden = hidden * (1 + signs * torch.finfo(hidden.dtype).eps)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    handle = find_layers(model)[0].register_forward_pre_hook(nudge, with_kwargs=True)
    try:
        return masked_forward(model, tokens, kept, PROMPT_TOKENS, **_positions(model, tokens)).logits
    finally:
        handle.remove()


def _dtype(model: nn.Module) -> torch.dtype:
    return getattr(model, "dtype", None) or next(p.dtype for p in model.parameters() if p.is_floating_point())


def _unit(model: nn.Module) -> float:
    """The rounding unit of this model's arithmetic: norms of a float64 model compute in float32, TF32 has 10 bits."""
    unit = max(torch.finfo(_dtype(model)).eps, torch.finfo(torch.float32).eps)
    on_gpu = any(p.device.type == "cuda" for p in model.parameters())
    tf32 = on_gpu and torch.get_float32_matmul_precision() != "highest"
    return max(unit, 2.0**-10) if tf32 else unit


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode and random state of their own."""
    training = [module for module in model.modules() if module.training]
    gpus = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    model.eval()
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        for module in training:
            module.training = True
