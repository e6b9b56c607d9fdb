"""The one error type of the library beside ``ValueError``.

A bad *field* (a ratio outside (0, 1], an unknown preset) is a ``ValueError``. A *use* that cannot be pruned correctly
(a static cache, an encoder-decoder) is a `PruningNotSupported`. Both say what was given and what to do instead.
"""

from __future__ import annotations


class PruningNotSupported(RuntimeError):
    """A use of the model that token pruning cannot serve correctly; the message names the remedy."""
