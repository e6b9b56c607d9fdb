"""Uses of ``generate`` that pruning cannot serve, refused before any compute.

``generate`` decides about chunked prefill, drafting and the kind of cache before the first forward, where hooks would
see it too late. So the one model object gets a checking ``generate`` for as long as the ``with`` lasts.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from sdtp_lib.architectures.caches import refuse_cache
from sdtp_lib.config import PruningNotSupported

_FIXED_LENGTH_CACHES = ("static", "hybrid", "sliding_window")


@contextlib.contextmanager
def guarded_generate(model: Any) -> Iterator[None]:
    """Shadow ``model.generate`` by one that refuses first; the shadow is removed on the way out."""
    generate = getattr(model, "generate", None)
    if generate is None:
        yield
        return

    @functools.wraps(generate)
    def checked_generate(*args: Any, **kwargs: Any) -> Any:
        refuse_generation(model, kwargs)
        return generate(*args, **kwargs)

    before = vars(model).get("generate")
    model.generate = checked_generate
    try:
        yield
    finally:
        if before is None:
            del model.generate
        else:
            model.generate = before


def refuse_generation(model: Any, arguments: Mapping[str, Any]) -> None:
    """Raise `PruningNotSupported` for generation settings that cannot go with pruning; each message has the remedy."""

    def setting(name: str) -> Any:
        for source in (arguments.get("generation_config"), getattr(model, "generation_config", None)):
            if arguments.get(name) is not None:
                return arguments[name]
            if getattr(source, name, None) is not None:
                return getattr(source, name)
        return None

    chunk = setting("prefill_chunk_size")
    if chunk is not None:
        raise PruningNotSupported(
            f"prefill_chunk_size={chunk}: pruning by chunk does not exist yet, and each chunk would be taken for a "
            "continuation: leave prefill_chunk_size out."
        )
    if arguments.get("assistant_model") is not None or setting("prompt_lookup_num_tokens") is not None:
        raise PruningNotSupported(
            "assisted decoding (assistant_model, prompt_lookup_num_tokens) puts drafted tokens into the prefill, which "
            "would be pruned with the prompt: generate without them inside token_pruning."
        )
    if setting("use_cache") is False:
        raise PruningNotSupported(
            "use_cache=False recomputes the whole prompt for each new token, so each would be pruned anew: "
            "leave use_cache out."
        )
    implementation = setting("cache_implementation")
    if implementation is not None and any(name in str(implementation) for name in _FIXED_LENGTH_CACHES):
        raise PruningNotSupported(
            f"cache_implementation={implementation!r} is a cache with one length for all layers: use 'dynamic', "
            "'offloaded' or 'quantized'."
        )
    cache = arguments.get("past_key_values")
    if cache is not None:
        refuse_cache(cache)
