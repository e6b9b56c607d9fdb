"""Packages that only some uses need, and the sentence for the one that is missing.

The core (torch, transformers, huggingface-hub, safetensors, numpy) is imported as usual, and so is tqdm, which both
transformers and huggingface-hub require. Every other package belongs to an extra of pyproject.toml and is imported
inside `extra`. Knows packages by name only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtra(ModuleNotFoundError):
    """A package of an extra is not installed; the text says which extra brings it."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Import what the extra ``name`` brings, inside a ``with``.

    >>> with extra("train"):
    ...     import pandas

    Raises
    ------
    MissingExtra
        If a package is not installed: one sentence with the command that installs it.
    """
    try:
        yield
    except MissingExtra:  # an inner `extra` knows better which one
        raise
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"{error.name} is not installed: pip install 'sdtp-lib[{name}]'", name=error.name, path=error.path
        ) from error
