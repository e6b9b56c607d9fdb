"""What the commands of this folder share at their edge: an error as one sentence, and the types of their sizes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from sdtp_lib.__main__ import _SAYABLE
from sdtp_lib.commands.arguments import count


def amount(text: str) -> int:
    """For ``type=``: a whole number of 0 or more."""
    return 0 if text.strip() == "0" else count(text)


def told(main: Callable[[Sequence[str] | None], int | None], arguments: Sequence[str] | None = None) -> int:
    """The exit code of ``main``; 2 for what `sdtp_lib.__main__` says in one sentence too, which then stands on standard
    error. All else is a bug and raises."""
    try:
        return main(arguments) or 0
    except Exception as error:
        if type(error).__name__ not in _SAYABLE and not isinstance(error, (ValueError, OSError, MemoryError)):
            raise
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
