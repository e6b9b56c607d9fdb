"""Every method by its name: the one list that commands, tables and legends read."""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import Any

from sdtp_lib.methods.asl import ASL
from sdtp_lib.methods.claa import CLAA
from sdtp_lib.methods.earlier_scheme import EarlierScheme
from sdtp_lib.methods.fastkv import FastKV
from sdtp_lib.methods.gemfilter import GemFilter
from sdtp_lib.methods.h2o import H2O
from sdtp_lib.methods.lazyllm import LazyLLM
from sdtp_lib.methods.method import Method
from sdtp_lib.methods.pyramidinfer import PyramidInfer
from sdtp_lib.methods.sdtp import SDTP, SDTPFast, SDTPLow
from sdtp_lib.methods.sliminfer import SlimInfer
from sdtp_lib.methods.snapkv import SnapKV
from sdtp_lib.methods.specprefill import SpecPrefill
from sdtp_lib.methods.streamingllm import StreamingLLM
from sdtp_lib.methods.uniprefill import UniPrefill

_METHODS = {
    method.name: method
    for method in (
        SDTP, SDTPLow, SDTPFast, LazyLLM, GemFilter, FastKV, CLAA, SlimInfer, UniPrefill, ASL, PyramidInfer,
        StreamingLLM, SnapKV, H2O, SpecPrefill, EarlierScheme,
    )
}  # fmt: skip


def names() -> list[str]:
    """The names of all methods."""
    return list(_METHODS)


def named(text: str) -> Method:
    """A method as a person types it: ``fastkv`` with its paper's budget, ``fastkv@1.5x`` at a prefill speed-up.

    Raises
    ------
    ValueError
        For what is no text, an unknown name, or what is no speed-up.
    """
    if not isinstance(text, str):
        raise ValueError(f"method={text!r} is no text: give a name such as 'fastkv', or 'fastkv@1.5x'.")
    name, at, speedup = text.partition("@")
    method = get(name)
    if not at:
        return method
    if re.fullmatch(r"\d+(?:\.\d+)?x", speedup) is None:
        raise ValueError(f"method={text!r}: {speedup!r} is no speed-up: give {name}@1.5x, or {name} alone.")
    return method.at_speedup(float(speedup[:-1]))


def get(name: str, **changes: Any) -> Method:
    """The method of that name with its paper's settings; ``changes`` replace single ones.

    Raises
    ------
    ValueError
        For a name or a setting that is not known; the message names those that are, and the likeliest.
    """
    if not isinstance(name, str) or name not in _METHODS:
        near = difflib.get_close_matches(str(name).lower(), _METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"method={name!r} is unknown: choose one of {', '.join(_METHODS)}{hint}")
    known = [field.name for field in dataclasses.fields(_METHODS[name])]
    unknown = sorted(set(changes) - set(known))
    if unknown:
        raise ValueError(f"{name} has no setting {unknown[0]!r}: it has {', '.join(known)}.")
    return _METHODS[name](**changes)
