"""What a person gave, checked by name: each is returned, or a ``ValueError`` says field, value and remedy.

`told` is how a program ends on such an error: one sentence and an exit code.
"""

from __future__ import annotations

import argparse
import math
import operator
import sys
from collections.abc import Callable, Iterable
from typing import Any


def whole_number(field: str, value: Any) -> int:
    """``value`` as an int; a ``ValueError`` that names ``field`` where it is none."""
    try:
        if _says_no_number(value):
            raise TypeError
        return operator.index(value)
    except (TypeError, RuntimeError):  # torch's and numpy's arrays of one whole number have an index, of 2.5 none
        raise ValueError(f"{field}={value!r} is not a whole number: give one such as 4.") from None


def _says_no_number(value: Any) -> bool:
    """Whether ``value`` is a truth value, a text or a complex number, which ``float`` may take for a number."""
    kind = str(getattr(value, "dtype", ""))  # torch's and numpy's, scalars and arrays
    return isinstance(value, (bool, str, bytes, bytearray, complex)) or "bool" in kind or "complex" in kind


def count_of_tokens(field: str, value: Any) -> int:
    """A whole number of at least 1."""
    if (count := whole_number(field, value)) < 1:
        raise ValueError(f"{field}={value} is not a number of tokens: give 1 or more.")
    return count


def neighbours(field: str, value: Any) -> int:
    """An odd whole number of at least 1: a token and as many on either side."""
    if (count := whole_number(field, value)) < 1 or count % 2 == 0:
        raise ValueError(f"{field}={value} is not an odd number of neighbours: give 1 (none), 3, 5, 7, ...")
    return count


def real_number(field: str, value: Any) -> float:
    """``value`` as a float that is a number; infinity is one, to `weight` it is none."""
    try:
        number = math.nan if _says_no_number(value) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # torch's of a tensor that is not one number
        number = math.nan
    if math.isnan(number):
        raise ValueError(f"{field}={value!r} is not a number: give one such as 0.5.")
    return number


def share(field: str, value: Any) -> float:
    """A number in (0, 1]."""
    if not 0 < (number := real_number(field, value)) <= 1:
        raise ValueError(f"{field}={number} is outside (0, 1]: give a share, such as 0.5.")
    return number


def count(field: str, value: Any) -> int:
    """A whole number of at least 0."""
    if (number := whole_number(field, value)) < 0:
        raise ValueError(f"{field}={number} is negative: give 0 or more.")
    return number


def weight(field: str, value: Any) -> float:
    """A finite number."""
    if math.isinf(number := real_number(field, value)):
        raise ValueError(f"{field}={number} is no weight: give a finite number.")
    return number


def one_of(field: str, value: Any, known: Iterable[str]) -> Any:
    """A name that is among ``known``."""
    if value not in known:
        raise ValueError(f"{field}={value!r} is unknown: choose one of {', '.join(known)}.")
    return value


def typed_count(text: str) -> int:
    """For ``add_argument(type=...)``: a whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def typed_amount(text: str) -> int:
    """For ``add_argument(type=...)``: a whole number of 0 or more."""
    return 0 if text.strip() == "0" else typed_count(text)


def told(command: Callable[[], int | None]) -> int:
    """The exit code of ``command``: 0 for None; 2 for an error of use or of the machine, which is then one sentence on
    standard error; 130 for Ctrl-C. All else is a bug and raises."""
    try:
        return command() or 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if type(error).__name__ not in _SAYABLE and not isinstance(error, (ValueError, OSError, MemoryError)):
            raise
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2


# By name: their modules load torch, and a command has loaded them by then.
_SAYABLE = {"PruningNotSupported", "MissingExtra", "OtherProvenance", "OutOfMemoryError", "BeingWritten",
            "NothingMeasured"}  # fmt: skip
