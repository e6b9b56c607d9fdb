"""An attention function of our own in transformers' registries, for as long as a ``with`` lasts.

Part of the door to transformers' internals (`architectures`). The functions of transformers stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class _Alias(str):
    """Equals a backend's name wherever a module compares it, but is itself in the registries (its hash is its own).

    Some attention modules go other ways for other names (sparse attention makes its mask for "eager" and "sdpa" only):
    under a name that they do not know they would silently compute something else.
    """

    __slots__ = ()

    def __hash__(self) -> int:
        return id(self)


@contextlib.contextmanager
def own_attention(config: Any, function: Callable, backend: str, masks: Callable | None = None) -> Iterator[None]:
    """Let the layers that read ``config`` call ``function`` where they would call ``backend``'s.

    Its masks stay, unless ``masks`` makes them in its place.
    """
    name = _Alias(backend)
    ALL_ATTENTION_FUNCTIONS.register(name, function)
    # Without an entry here (in the class-wide table: only that one is looked at) transformers would hand out no mask at
    # all, and padded batches would be silently wrong.
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, masks or ALL_MASK_ATTENTION_FUNCTIONS[backend])
    try:
        with backend_named(config, name):
            yield
    finally:
        for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            registry._global_mapping.pop(name, None)


@contextlib.contextmanager
def backend_named(config: Any, name: str) -> Iterator[None]:
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
