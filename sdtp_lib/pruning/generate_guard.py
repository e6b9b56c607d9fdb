"""Uses of ``generate`` that pruning cannot serve, refused before any compute.

``generate`` decides about chunked prefill, drafting and the kind of cache before the first forward, where hooks would
see it too late. So the model whose own ``generate`` it is (under PEFT, the model inside) gets a checking one for as
long as the ``with`` lasts. It reads the settings as transformers resolves them: keywords over a given configuration
over the model's own. It announces a prompt that is to come in chunks, whose size may then be made smaller. It knows
nothing of how pruning works.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import transformers
from torch import nn
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import DYNAMIC_CACHE_IMPLEMENTATIONS, GenerationMode

from sdtp_lib.architectures.caches import cache_of, refuse_cache
from sdtp_lib.config import PruningNotSupported

# input ids, attention mask, cache, chunk size -> a `with` that yields the size to use
InChunks = Callable[[Any, Any, Any, int], contextlib.AbstractContextManager[int]]
# how often each row of the prompt is repeated -> a `with` around the whole call
Repeated = Callable[[int], contextlib.AbstractContextManager[None]]
CHUNKS_FROM = (5, 24)  # the first release whose own chunks were seen equal to the whole prompt
_DRAFTING = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
_FROM_THE_HUB = {
    GenerationMode.CONTRASTIVE_SEARCH: ("penalty_alpha",),
    GenerationMode.DOLA_GENERATION: ("dola_layers",),
    GenerationMode.GROUP_BEAM_SEARCH: ("num_beam_groups",),
    GenerationMode.CONSTRAINED_BEAM_SEARCH: ("constraints", "force_words_ids"),
}


@contextlib.contextmanager
def guarded_generate(model: nn.Module, in_chunks: InChunks, repeated: Repeated) -> Iterator[None]:
    """Shadow ``generate`` and the door of continuous batching by ones that refuse first; removed on the way out.

    ``in_chunks(input_ids, attention_mask, cache, size)`` is entered around a ``generate`` that hands its prompt over in
    chunks, and yields the size that these are to have; ``repeated(times)`` around every call, whose rows beams and
    several answers repeat.
    """
    with contextlib.ExitStack() as cleanup:
        for module in model.modules():
            if isinstance(module, GenerationMixin):
                prepare = functools.partial(_prepared, module, module.generate, in_chunks, repeated)
                cleanup.enter_context(_prepared_first(module, "generate", prepare))
                # Every way into continuous batching comes through here, `generate_batch` too.
                if hasattr(module, "init_continuous_batching"):
                    cleanup.enter_context(_prepared_first(module, "init_continuous_batching", _refuse_batching))
        yield


@contextlib.contextmanager
def _prepared_first(module: nn.Module, name: str, prepare: Callable[..., Any]) -> Iterator[None]:
    """Give this one object a method ``name`` that runs inside ``prepare(its arguments)``, with what that yields."""
    method, own = getattr(module, name), name in vars(module)

    @functools.wraps(method)
    def prepared(*args: Any, **kwargs: Any) -> Any:
        with prepare(*args, **kwargs) as (args, kwargs):
            return method(*args, **kwargs)

    setattr(module, name, prepared)
    try:
        yield
    finally:
        if own:
            setattr(module, name, method)
        else:
            delattr(module, name)


@contextlib.contextmanager
def _prepared(
    model: Any, generate: Callable[..., Any], in_chunks: InChunks, repeated: Repeated, *args: Any, **kwargs: Any
) -> Iterator[tuple[tuple, dict[str, Any]]]:
    """What ``generate`` is to be called with: refused, as it was given, or with smaller chunks."""
    arguments = _by_name(generate, args, kwargs)
    settings, for_the_model = effective_settings(model, arguments)
    refuse_generation(arguments, settings, for_the_model)
    times = max(settings.num_beams or 1, settings.num_return_sequences or 1)
    size = settings.prefill_chunk_size
    if size is None:
        with repeated(times):
            yield args, kwargs
        return
    ids = arguments.get("inputs", for_the_model.get("input_ids"))
    chunks = in_chunks(ids, for_the_model.get("attention_mask"), cache_of(for_the_model), int(size))
    with repeated(times), chunks as smaller:
        if smaller == size:
            yield args, kwargs
            return
        if (own := arguments.get("generation_config")) is None:
            arguments["prefill_chunk_size"] = smaller
        else:  # a setting beside a configuration warns
            arguments["generation_config"] = own = copy.deepcopy(own)
            arguments.pop("prefill_chunk_size", None)
            own.prefill_chunk_size = smaller
        yield (), arguments


def refuse_generation(arguments: dict[str, Any], settings: GenerationConfig, for_the_model: dict[str, Any]) -> None:
    """Raise `PruningNotSupported`, with the remedy, where ``generate(**arguments)`` cannot go with pruning."""
    for name, refuse, why in _REFUSED:
        value = arguments.get(name, getattr(settings, name, None))
        if refuse(value):
            raise PruningNotSupported(f"{name}={value!r} {why}.")
    if settings.prefill_chunk_size is not None and settings.cache_implementation in ("quantized", "offloaded"):
        raise PruningNotSupported(
            f"prefill_chunk_size={settings.prefill_chunk_size} with cache_implementation="
            f"{settings.cache_implementation!r}: keys of the query tokens are taken out of the cache again, which "
            "one that quantises or offloads cannot do: use 'dynamic', or leave one of the two out."
        )
    if settings.prefill_chunk_size is not None and _release() < CHUNKS_FROM:
        raise PruningNotSupported(
            f"prefill_chunk_size={settings.prefill_chunk_size} with transformers {transformers.__version__}: 5.2 gives "
            "other logits by chunks than for the whole prompt, also unpruned; seen right from 5.24 on: update "
            "transformers, or leave prefill_chunk_size out."
        )
    assistant = arguments.get("assistant_model")
    mode = settings.get_generation_mode(assistant)
    given = {**settings.to_dict(), "assistant_model": type(assistant).__name__ if assistant is not None else None}
    if mode == GenerationMode.ASSISTED_GENERATION:
        raise PruningNotSupported(
            f"assisted decoding ({_named(given, _DRAFTING)}) puts drafted tokens into the prefill, which would be "
            "pruned with the prompt: leave it out inside token_pruning."
        )
    if mode in _FROM_THE_HUB:
        raise PruningNotSupported(
            f"{_named(given, _FROM_THE_HUB[mode])} asks for {mode.value.replace('_', ' ')}, which transformers has "
            "handed to code on the Hub that runs forwards of its own: use greedy search, sampling or beam search."
        )
    cache = cache_of(for_the_model)
    if cache is not None:
        refuse_cache(cache)


def effective_settings(model: Any, arguments: dict[str, Any]) -> tuple[GenerationConfig, dict[str, Any]]:
    """The settings that ``generate`` would work with, as transformers resolves them, and what is left for the model."""
    own = inspect.signature(GenerationMixin.generate).parameters
    given = {name: value for name, value in arguments.items() if name not in own}
    return model._prepare_generation_config(arguments.get("generation_config"), **given)


def _by_name(generate: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Positional and keyword arguments by name, as Python binds them."""
    bound = inspect.signature(generate).bind(*args, **kwargs)
    named = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
    return named


def _release() -> tuple[int, ...]:
    return tuple(int(part) for part in transformers.__version__.split(".")[:2])


def _named(settings: dict[str, Any], names: tuple[str, ...]) -> str:
    return ", ".join(f"{name}={settings[name]!r}" for name in names if settings.get(name)) or "by its settings"


@contextlib.contextmanager
def _refuse_batching(*_args: Any, **_kwargs: Any) -> Iterator[tuple[tuple, dict[str, Any]]]:
    raise PruningNotSupported(
        "continuous batching (generate_batch) packs prompts of many requests into one row of a paged cache: call "
        "generate with a batch, padded on the left."
    )
    yield


# setting -> whether a value is refused, and why, with the remedy; checked in this order
_REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "custom_generate", lambda value: isinstance(value, str),
        "runs decoding code from the Hub, whose forwards are not known here: give your decoding loop as a function, or "
        "leave custom_generate out",
    ),
    (
        "use_cache", lambda value: value is False,
        "recomputes the whole prompt for each new token, so each would be pruned anew: leave use_cache out",
    ),
    (
        "cache_implementation", lambda value: value == "paged",
        "is continuous batching, which packs prompts of many requests into one row: leave cache_implementation out",
    ),
    (
        "cache_implementation", lambda value: value is not None and value not in DYNAMIC_CACHE_IMPLEMENTATIONS,
        "is a cache with one length for all layers: use 'dynamic', 'offloaded' or 'quantized'",
    ),
)  # fmt: skip
